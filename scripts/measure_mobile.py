"""Measures engines for phones and boards against ONNX Runtime, on this machine.

python scripts/measure_mobile.py                                    # nine models, fp32
python scripts/measure_mobile.py lsnet_t --engines litert --precisions fp32 fp16 int8

One image of 224x224 (or `--size`), re-parameterized, random weights. All files of a model take
turns in one process; milliseconds are medians of all calls, and a ratio is the median over turns of
that to ONNX Runtime in fp32 (below 1 is faster). A file that cannot be made says so. Size is of
all that the engine reads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure_deploy import deployed

import backbones
from backbones.bench import Times
from backbones.engines import ENGINES, Runner, processor, take_turns

MODELS = (
    "cpubone_nano inception_next_atto lsnet_t convnext_atto unireplknet_a spartan_t hornet_tiny_7x7"
    " moganet_xtiny spanet_small"
).split()
BASELINE = "onnxruntime fp32"


def runners(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Runner]:
    """Return runners by engine and precision; what cannot be had goes to stderr."""
    torch.manual_seed(0)
    model = backbones.create_model(name).eval()
    size = (3, options.size, options.size)
    wanted = [(e, p) for e in options.engines for p in options.precisions]
    tried = deployed(name, model, [("onnxruntime", "fp32"), *wanted], size, folder, options.threads)
    found = {}
    for key, runner in tried.items():
        if isinstance(runner, str):
            print(f"  {name}: no {key}: {runner}", file=sys.stderr)
        else:
            found[key] = runner
    return found


def megabytes(runner: Runner) -> str:
    """Return the size of a runner's files; "-" if it has none."""
    path = getattr(runner, "path", None)
    if path is None:
        return "-"
    files = {file for file in path.parent.glob(f"{path.stem}.*") if file.suffix in _BESIDE}
    return f"{sum(file.stat().st_size for file in {path, *files}) / 1e6:.1f}"


_BESIDE = (".bin", ".data")  # files of weights


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="default: nine models")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["onnxruntime", "litert", "ncnn"],
        choices=ENGINES,
        metavar="ENGINE",
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32"], help="(default: fp32)")
    parser.add_argument("--size", type=int, default=224, help="height and width (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each file (%(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for files (default: none are kept)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} thread(s), {options.size}x{options.size}\n")
    print("| model | engine | precision | ms | of ONNX Runtime fp32 | MB |")
    print("|---|---|---|---|---|---|", flush=True)
    x = torch.randn(1, 3, options.size, options.size)
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found = runners(name, options, options.cache or Path(folder))
            turns = take_turns(found, x, warmup_s=0.5, seconds=options.seconds)
            times = {key: Times(one) for key, one in turns.items()}
            for key, one in times.items():
                ratio = "-"
                if BASELINE in times:
                    ratios = np.divide(one.turn_medians, times[BASELINE].turn_medians)
                    ratio = f"{np.median(ratios):.2f}"
                engine, precision = key.split()
                cells = f"`{name}`", engine, precision, f"{one.median:.2f}", ratio
                print("| " + " | ".join((*cells, megabytes(found[key]))) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
