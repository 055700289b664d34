"""Measures what int8 and bf16 cost in accuracy and gain in speed, on models trained on photographs.

python scripts/measure_int8.py photos                            # the smallest of every family
python scripts/measure_int8.py photos lsnet_t --engines litert   # this model, in this engine

`photos` holds `train/<class>/<image>`, `validation/...` and, for images that nothing has seen,
`test/...`. Each model is trained from scratch at 160x160 by its finetune recipe for some epochs
(`--epochs`), or taken from `--checkpoints`, where trained ones are put. int8 is calibrated on the
validation images. Accuracy and agreement with float32 are of the test images; milliseconds are for
one image, medians over turns in one process, and of the engines given the fastest counts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure_finetuning import smallest_members
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import Tensor

import backbones
from backbones import train
from backbones.bench import Times, examine
from backbones.engines import ENGINES, Runner, take_turns
from backbones.errors import BackbonesError


def trained(name: str, options: argparse.Namespace) -> Path:
    """Return the checkpoint of a trained model."""
    path: Path = options.checkpoints / f"{name}.safetensors"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            report = train.run(
                model=name,
                data_dir=str(options.photos),
                img_size=options.size,
                epochs=options.epochs,
                output=folder,
                progress=lambda u: print(f"{u.step}/{u.steps}", end="\r", file=sys.stderr),
            )
            options.checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(report.folder) / "model_best.safetensors", path)
    return path


@dataclass(frozen=True)
class Unseen:
    """Images (N, C, H, W) that neither training nor calibration saw, and their classes (N,)."""

    images: Tensor
    classes: Tensor

    def logits(self, runner: Runner) -> Tensor:
        """Return what a runner gives (N, classes)."""
        return torch.cat([runner(part) for part in self.images.split(8)])

    def top1(self, logits: Tensor) -> float:
        """Return the accuracy in percent."""
        return 100 * float((logits.argmax(1) == self.classes).double().mean())


def unseen_images(model: torch.nn.Module, options: argparse.Namespace) -> Unseen:
    """Return the test images, or the validation images where there are none."""
    config = {**resolve_model_data_config(model), "input_size": (3, options.size, options.size)}
    test = options.photos / "test"
    folder = test if test.is_dir() else options.photos / "validation"
    images = ImageDataset(str(folder), transform=create_transform(**config))
    found = [images[i] for i in range(len(images))]
    return Unseen(torch.stack([x for x, _ in found]), torch.tensor([y for _, y in found]))


def runners(
    model: torch.nn.Module, name: str, options: argparse.Namespace, folder: Path
) -> dict[tuple[str, str], Runner]:
    """Return runners by precision and engine; what cannot be had goes to stderr."""
    found = {}
    for precision in ("fp32", "bf16", "int8"):
        for engine in options.engines:
            if precision not in ENGINES[engine].precisions:
                continue
            try:
                found[precision, engine] = backbones.deploy(
                    model,
                    engine=engine,
                    precision=precision,
                    threads=options.threads,
                    input_size=(3, options.size, options.size),
                    calibration=options.photos / "validation" if precision == "int8" else None,
                    agreement=options.agreement,
                    cache_dir=folder,
                )
            except BackbonesError as error:
                print(f"  {name}: no {engine} {precision}: {error}", file=sys.stderr)
    return found


def row(name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the cells of a model."""
    model = backbones.load_model(trained(name, options)).eval()
    unseen = unseen_images(model, options)
    found = runners(model, name, options, folder)
    forms = {" ".join(key): runner for key, runner in found.items()}
    turns = take_turns(forms, unseen.images[:1], warmup_s=0.3, seconds=options.seconds)
    times = {key: Times(turns[" ".join(key)]) for key in found}
    best = {
        precision: min(
            (key for key in found if key[0] == precision), key=lambda key: times[key].median
        )
        for precision in dict.fromkeys(key[0] for key in found)
    }
    logits = {precision: unseen.logits(found[key]) for precision, key in best.items()}
    cells = [f"`{name}`"]
    cells += [f"{unseen.top1(logits[p]):.1f}" if p in logits else "-" for p in options.columns]
    if "int8" not in best:
        return [*cells, *["-"] * 7]
    same = (logits["int8"].argmax(1) == logits["fp32"].argmax(1)).double().mean()
    cells.append(f"{100 * float(same):.1f}")
    for precision in options.columns:
        key = best.get(precision)
        cells.append(f"{times[key].median:.2f} {key[1]}" if key else "-")
    slow, fast = (times[best[precision]].turn_medians for precision in ("fp32", "int8"))
    cells.append(f"{np.median(np.divide(slow, fast)):.2f}x")
    (candidate,) = found[best["int8"]].report.candidates
    notes = candidate.notes
    if "layers" in notes:
        kept, share = len(notes["layers_in_float32"]), 100 * notes["work_in_float32"]
        cells += [f"{kept} of {notes['layers']} ({share:.0f} %)", notes.get("rest", "fp32")]
        for layer in notes["layers_in_float32"]:
            print(f"  {name}: {layer} stays out of int8", file=sys.stderr)
    else:
        cells += ["", ""]
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder with train, validation and test")
    parser.add_argument("models", nargs="*", help="default: the smallest of every family")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["onnxruntime", "openvino"],
        choices=ENGINES,
        metavar="ENGINE",
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("output/measure_int8"))
    parser.add_argument("--epochs", type=int, default=8, help="of training (%(default)s)")
    parser.add_argument("--size", type=int, default=160, help="height and width (%(default)s)")
    parser.add_argument("--agreement", type=float, default=0.99, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each file (%(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for files (default: none are kept)")
    options = parser.parse_args()
    options.columns = ("fp32", "bf16", "int8")
    torch.set_num_threads(options.threads)
    print(examine(options.threads), end="\n\n", flush=True)
    print(
        "| model | top-1 fp32 (%) | bf16 | int8 | int8 agrees (%) | fp32 (ms) | bf16 | int8"
        " | int8 faster | layers not in int8 (of the work) | rest |"
    )
    print("|" + "---|" * 11, flush=True)
    for name in options.models or smallest_members():
        with tempfile.TemporaryDirectory() as folder:
            cells = row(name, options, options.cache or Path(folder))
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
