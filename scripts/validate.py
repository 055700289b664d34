"""Measure a model's accuracy on a folder of images; the same as ``backbones validate``.

python scripts/validate.py --data-dir FOLDER --checkpoint model_best.safetensors
"""

import sys

from backbones.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
