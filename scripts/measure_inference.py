"""Measures predictions over a folder of photographs against timm's `inference.py`.

python scripts/measure_inference.py PHOTOS --timm inference.py                  # four models
python scripts/measure_inference.py PHOTOS --timm inference.py lsnet_t --enlarge 1024 --reduce

`inference.py` comes from timm's source repository; it runs the same checkpoint eagerly, at the same
batch size, over the same images, with its default number of workers. Both take turns. Images a
second are those of the loop over batches, without the start of Python, timm's writing of its table,
or our preparation of the engine, which is remembered. Checkpoints are taken from `--checkpoints`,
where `<model>.safetensors` lies there (such as one that `backbones train` made of the photographs),
else they have random weights, whose speed is the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config

import backbones
from backbones.images import list_images

MODELS = ("lsnet_t", "cpubone_s0", "unireplknet_a", "convnext_atto")


def enlarged(photos: Path, side: int, folder: Path) -> Path:
    """Write the photographs again, their longer side of `side` pixels."""
    files = list_images(photos)
    for name in files.paths:
        target = (folder / name).with_suffix(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        image = files.open(name)
        scale = side / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image.resize(size, Image.Resampling.BICUBIC).save(target, quality=90)
    return folder


def checkpoint_of(name: str, classes: int, given: Path | None, folder: Path) -> Path:
    """Return a checkpoint of a model."""
    if given is not None and (given / f"{name}.safetensors").is_file():
        return given / f"{name}.safetensors"
    torch.manual_seed(0)
    path = folder / f"{name}.safetensors"
    backbones.save_checkpoint(backbones.create_model(name, num_classes=classes), path)
    return path


def run_timm(options: Any, name: str, checkpoint: Path, photos: Path, out: Path) -> float:
    """Run timm's script and return its images a second."""
    model = backbones.load_model(checkpoint)
    config = resolve_model_data_config(model)
    command = [sys.executable, "-m", "backbones.train.launch", str(options.timm), str(photos)]
    command += ["--model", name, "--checkpoint", str(checkpoint), "--device", "cpu"]
    command += ["--num-classes", str(model.num_classes), "-b", str(options.batch_size)]
    command += ["--img-size", str(config["input_size"][-1]), "--log-freq", "1"]
    command += ["--crop-pct", str(config["crop_pct"]), "--interpolation", config["interpolation"]]
    for key in ("mean", "std"):
        command += [f"--{key}", *map(str, config[key])]
    command += ["--results-dir", str(out), "--results-file", "timm", "--results-format", "csv"]
    command += ["--include-index", "--fullname", "--split", "", "--no-console-results"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(
        r"Predict: \[(\d+)/\d+\] Time [\d.]+ \(([\d.]+)\)", done.stderr + done.stdout
    )
    if done.returncode or not found:
        raise SystemExit(f"timm's script failed:\n{done.stdout}\n{done.stderr}")
    batches = int(found[-1][0]) + 1
    return len(list_images(photos)) / (batches * float(found[-1][1]))


def run_ours(options: Any, checkpoint: Path, photos: Path, out: Path, precision: str) -> Any:
    """Run ``backbones predict`` and return its summary."""
    command = [sys.executable, "-m", "backbones", "predict", str(checkpoint), str(photos)]
    command += ["--output", str(out / f"{precision}.csv"), "--top-k", "1", "--include-index"]
    command += ["--fullname", "-b", str(options.batch_size), "--precision", precision, "--json"]
    command += ["--reduce"] if options.reduce else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"predict failed:\n{done.stderr}")
    return json.loads(done.stdout)


def classes_in(path: Path, column: str, root: Path) -> dict[str, str]:
    """Return the index of the likeliest class by the path of the image."""
    with path.open(encoding="utf-8", newline="") as stream:
        return {str(root / row[column]): row["index"] for row in csv.DictReader(stream)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder of images in class folders")
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--timm", type=Path, required=True, help="timm's inference.py")
    parser.add_argument("--checkpoints", type=Path, help="folder of <model>.safetensors")
    parser.add_argument("--enlarge", type=int, help="pixels of the longer side")
    parser.add_argument("--reduce", action="store_true", help="reduced decoding, ours only")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos = options.photos.resolve()
        if options.enlarge:
            photos = enlarged(photos, options.enlarge, folder / "large")
        print(
            "| model | timm, images/s | precision | images/s | ratio | decoding | engine busy |"
            " same class | setting |\n|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        for name in options.models:
            checkpoint = checkpoint_of(name, 10, options.checkpoints, folder)
            for precision in options.precisions:  # measures the setting, which is remembered
                run_ours(options, checkpoint, photos, folder, precision)
            timm: list[float] = []
            ours: dict[str, list[Any]] = {precision: [] for precision in options.precisions}
            for _ in range(options.rounds):
                timm.append(run_timm(options, name, checkpoint, photos, folder))
                for precision in options.precisions:
                    ours[precision].append(run_ours(options, checkpoint, photos, folder, precision))
            expected = classes_in(folder / "timm.csv", "filename", photos)
            for precision, runs in ours.items():
                found = classes_in(folder / f"{precision}.csv", "path", photos)
                same = sum(found[path] == index for path, index in expected.items())
                ratio = statistics.median(
                    run["images_per_second"] / base for run, base in zip(runs, timm)
                )
                run, s = runs[-1], runs[-1]["setting"]
                print(
                    f"| `{name}` | {statistics.median(timm):.1f} | {precision} |"
                    f" {statistics.median(r['images_per_second'] for r in runs):.1f} |"
                    f" {ratio:.2f} | {run['decoding']:.0%} | {run['engine_busy']:.0%} |"
                    f" {same / len(expected):.2%} |"
                    f" {s['engine']}, {s['streams']} x {s['threads']} threads |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
