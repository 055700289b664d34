"""One file a family: its blocks, its class, its checkpoint key mapping."""
