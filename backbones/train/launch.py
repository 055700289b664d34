"""Run any script with our models registered in timm.

    python -m backbones.train.launch train.py --model lsnet_t --data-dir imagenet
    torchrun --nproc-per-node 2 -m backbones.train.launch train.py --model lsnet_t ...

Made for timm's own scripts (train, validate, benchmark, inference, onnx_export), which are in its
source repository, not in its packages. The script sees its own arguments and its own folder, as if
Python had been started with it.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``SCRIPT ARGUMENTS...``; exit code 2 where there is no such script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(
            f"error: {script}: no such script; timm's are in its source repository"
            " (github.com/huggingface/pytorch-image-models), not in its packages",
            file=sys.stderr,
        )
        return 2
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
