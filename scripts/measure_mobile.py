"""Measures the files that people ship against ONNX Runtime in float32, on this machine.

python scripts/measure_mobile.py                                     # nine models, five engines
python scripts/measure_mobile.py lsnet_t --engines litert --precisions fp32 int8

One image of 224x224 (or `--size`), re-parameterized, random weights, in int8 every layer quantized.
All files of a model take turns in one process. A cell has the median over turns of the ratio to
ONNX Runtime in fp32 (below 1 is faster), milliseconds (the median of all calls), and the size of
all that the engine reads. "delegated" is the share of operations that XNNPACK takes of an
ExecuTorch program. A file that cannot be made says why on the error stream, and its cell is empty.
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


ENGINES_OF_THE_TABLE = ("onnxruntime", "openvino", "litert", "executorch", "ncnn")


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
    weights = path.with_suffix(".bin") if path.suffix in (".xml", ".param") else None
    files = [path, path.with_name(f"{path.name}.data"), *([weights] if weights else [])]
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 1e6:.1f}"


def cell(runner: Runner, times: Times, baseline: Times | None) -> str:
    """Return ratio, milliseconds and size of a file."""
    ratio = ""
    if baseline is not None:
        ratio = f"{np.median(np.divide(times.turn_medians, baseline.turn_medians)):.2f} "
    return f"{ratio}({times.median:.1f} ms, {megabytes(runner)} MB)"


def delegated(runner: Runner | None) -> str:
    """Return the share of an ExecuTorch program that XNNPACK takes."""
    if runner is None:
        return ""
    (candidate,) = runner.report.candidates
    return f"{candidate.notes['delegated_share']:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="default: nine models")
    parser.add_argument(
        "--engines", nargs="+", default=ENGINES_OF_THE_TABLE, choices=ENGINES, metavar="ENGINE"
    )
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "fp16", "int8"], help="(default: all three)"
    )
    parser.add_argument("--size", type=int, default=224, help="height and width (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each file (%(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for files (default: none are kept)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} thread(s), {options.size}x{options.size}\n")
    print("| model | precision |", " | ".join(options.engines), "| delegated |")
    print("|---|---|" + "---|" * (len(options.engines) + 1), flush=True)
    x = torch.randn(1, 3, options.size, options.size)
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found = runners(name, options, options.cache or Path(folder))
            turns = take_turns(found, x, warmup_s=0.3, seconds=options.seconds)
            times = {key: Times(one) for key, one in turns.items()}
            for precision in options.precisions:
                cells = [f"`{name}`", precision]
                for engine in options.engines:
                    key = f"{engine} {precision}"
                    one = found.get(key)
                    cells.append(cell(one, times[key], times.get(BASELINE)) if one else "")
                cells.append(delegated(found.get(f"executorch {precision}")))
                print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
