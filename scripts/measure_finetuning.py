"""Fine-tunes the smallest member of every family on handwritten digits by its recipe.

python scripts/measure_finetuning.py                       # all families; takes hours
python scripts/measure_finetuning.py cpubone_nano lsnet_t  # these models

The images are scikit-learn's 1,797 digits at 64x64, a fifth of them held out. Released weights are
taken where the Hub can be reached. Prints the table of backbones/train/README.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

import backbones
from backbones import train
from backbones.train import write_digits

# Enough on the digits; the large ones learn more from each image, and take longer over it.
EPOCHS = {
    "convnext": 20,
    "cpubone": 10,
    "inception_next": 20,
    "overlock": 10,
    "patchconvnet": 20,
}
OTHERS = 12


def smallest_members() -> list[str]:
    """Return the variant with the fewest parameters of each family."""
    return [
        min(backbones.list_models(family=family), key=lambda n: backbones.model_info(n).params)
        for family in backbones.list_families()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="default: the smallest of every family")
    parser.add_argument("--epochs", type=int, help="bound (default: 10 to 20, by family)")
    parser.add_argument("--threads", type=int, help="(default: PyTorch's)")
    parser.add_argument("--least", type=float, default=97.0, help="top-1 to reach (%(default)s)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| model | start | epochs | seconds | top-1 of the best epoch (%) | of the last (%) |")
    print("|---|---|---|---|---|---|", flush=True)
    worst = 100.0
    with tempfile.TemporaryDirectory() as name:
        write_digits(Path(name) / "digits")
        for model in options.models or smallest_members():
            family = backbones.model_info(model).family
            began = time.perf_counter()
            report = train.run(
                model=model,
                data_dir=str(Path(name) / "digits"),
                img_size=64,
                epochs=options.epochs or EPOCHS.get(family, OTHERS),
                output=name,
                progress=lambda u: print(f"{u.step}/{u.steps}", end="\r", file=sys.stderr),
            )
            best = report.epochs[report.best_epoch - 1].val_top1 or 0.0
            last = report.epochs[-1].val_top1 or 0.0
            worst = min(worst, best)
            initial = report.initial_weights
            start = "scratch" if initial.from_scratch else initial.source
            seconds = time.perf_counter() - began
            print(
                f"| {model} | {start} | {len(report.epochs)} | {seconds:.0f} | {best:.2f}"
                f" | {last:.2f} |",
                flush=True,
            )
    if worst < options.least:
        print(f"error: {worst:.2f} % is below {options.least} %", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
