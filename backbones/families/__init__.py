"""One file or package a family: its blocks, its class, its checkpoint layouts."""
