"""Measure a model's accuracy on a folder of images, with the options of timm's script.

python scripts/validate.py --data-dir FOLDER --checkpoint model_best.safetensors
python scripts/validate.py --data-dir FOLDER --model lsnet_t --checkpoint somebody_elses.pth

Otherwise the same as ``backbones validate``, where the model is the first operand.
"""

import argparse
import sys

from backbones.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--checkpoint")
    timms, others = parser.parse_known_args()
    if timms.checkpoint:
        others = [timms.checkpoint, *others]
        others += ["--name", timms.model] if timms.model else []
    elif timms.model:
        others = [timms.model, *others]
    sys.exit(main(["validate", *others]))
