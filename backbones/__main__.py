"""``python -m backbones``: the command line."""

from __future__ import annotations

import sys

from backbones.cli import main

if __name__ == "__main__":
    sys.exit(main())
