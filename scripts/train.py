"""Fine-tune a model on a folder of images; the same as ``backbones train``.

python scripts/train.py --data-dir FOLDER --model lsnet_t
torchrun --nproc-per-node 2 scripts/train.py --data-dir FOLDER --model lsnet_t
"""

import sys

from backbones.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
