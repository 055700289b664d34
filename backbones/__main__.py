"""``python -m backbones``: the command line."""

import sys

from backbones.cli import main

if __name__ == "__main__":
    sys.exit(main())
