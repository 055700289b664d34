"""Small collections of images and a small model with weights that tell them apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from randomized import randomize

import backbones
from backbones.train import set_input

CLASSES = ["ant", "bee", "cat", "dog"]
SHAPE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


def picture(seed: int, size: tuple[int, int] = (40, 56), mode: str = "RGB") -> Image.Image:
    """Return colored noise, coarse enough to survive resizing and JPEG."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), np.uint8)
    return Image.fromarray(noise.squeeze()).resize(size[::-1], Image.Resampling.NEAREST)


def write_pictures(folder: Path, count: int, suffix: str = ".png", **options) -> list[Path]:
    """Write images into two class folders, in natural order of their names."""
    paths = []
    for i in range(count):
        path = folder / CLASSES[2 * i // count] / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, **options).save(path)
        paths.append(path)
    return paths


def small_model(in_chans: int = 3, **options) -> torch.nn.Module:
    """Return a convnext whose classes differ from image to image."""
    arguments = {**SHAPE, "num_classes": len(CLASSES), **options}
    model = backbones.create_model("convnext_atto", in_chans=in_chans, **arguments)
    randomize(model)
    set_input(model, 32)
    return model.eval()


def json_rows(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
