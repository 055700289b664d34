"""What XNNPACK runs of ExecuTorch programs, and how fast they are beside ONNX Runtime in float32.

Random weights, one image. The files of a model take turns in one process. By default the smallest
member of every family is measured, at 224 pixels:

    python scripts/measure_executorch.py --threads 1
    python scripts/measure_executorch.py --threads 1 cpubone_nano convnext_atto
    python scripts/measure_executorch.py --shares  # with height and width free, one block a stage
"""

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from measure_finetuning import smallest_members

import backbones
from backbones.engines import export, open_exported, processor, take_turns
from backbones.errors import BackbonesError


def row(name: str, size: int, threads: int, int8: bool) -> str:
    """Measure one model and return its row of the table."""
    torch.manual_seed(0)
    model = backbones.create_model(name, deploy=True).eval()
    shape = (3, size, size)
    images = torch.randn(8, *shape)
    write = partial(export, model, input_size=shape, batch_size=1, verify=False)
    with TemporaryDirectory() as folder:
        files = {"ort": Path(folder, "m.onnx"), "fp32": Path(folder, "m.pte")}
        write(files["ort"])
        notes = write(files["fp32"]).notes
        if int8:
            files["int8"] = Path(folder, "int8.pte")
            write(files["int8"], precision="int8", calibration=images)
        runners = {key: open_exported(path, threads=threads) for key, path in files.items()}
        turns = take_turns(runners, images[:1], warmup_s=0.2, seconds=2.0)
        ms = {key: float(np.median(np.concatenate(turns[key]))) for key in runners}
        del runners
    rows = [f"`{name}`", f"{notes['delegated_share']:.3f}", f"{ms['ort']:.1f}"]
    for key in ("fp32", "int8"):
        rows += [f"{ms[key]:.1f}", f"{ms[key] / ms['ort']:.2f}"] if key in ms else []
    return "| " + " | ".join(rows) + " |"


def shares(name: str) -> str:
    """Lower a model of one block a stage for all sizes, and return its row of what XNNPACK runs."""
    torch.manual_seed(0)
    depths = backbones.create_model(name, device="meta").arguments["depths"]
    fewer = {"depths": [min(depth, 1) for depth in depths]}
    model = backbones.create_model(name, **fewer, deploy=True).eval()
    found = []
    with TemporaryDirectory() as folder:
        write = partial(export, model, Path(folder, "m.pte"), input_size=(3, 64, 64), verify=False)
        for images in (None, 1):
            report = write(dynamic=("batch", "height", "width"), batch_size=images)
            found.append(f"{report.notes['delegated_share']:.3f}")
    return f"| `{name}` | " + " | ".join(found) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="(default: the smallest member of each family)")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--int8", action="store_true", help="also measure int8")
    parser.add_argument("--shares", action="store_true", help="what XNNPACK runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.shares:
        head = ["all sizes free, one block a stage", "delegated", "with `--batch 1`"]
        measure = shares
    else:
        print(
            f"{processor()}, {args.threads} threads, {args.img_size} pixels, medians in ms",
            flush=True,
        )
        head = ["model", "delegated", "ONNX Runtime", "ExecuTorch", "ratio"]
        head += ["int8", "ratio"] if args.int8 else []
        measure = partial(row, size=args.img_size, threads=args.threads, int8=args.int8)
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    for name in args.models or smallest_members():
        try:
            print(measure(name), flush=True)
        except BackbonesError as error:
            print(f"| `{name}` | {error} |", flush=True)


if __name__ == "__main__":
    main()
