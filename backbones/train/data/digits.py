"""scikit-learn's 1,797 real handwritten digits (UCI "Optical Recognition of Handwritten Digits",
its test part) written out as an image folder."""

import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from backbones.errors import DataError
from backbones.optional import optional_import

__all__ = ["write_digits"]

PIXELS = 32  # side of the pictures: four times the 8x8 of the originals
HELD_OUT = 0.2
MINIMUM = 30  # one image of each digit held out
OURS = re.compile(r"(train|val)/\d/\d{4}\.png")


def write_digits(root: str | Path, *, limit: int | None = None) -> tuple[int, int]:
    """Write the digits as ``root/{train,val}/<digit>/<number>.png``; return how many train and val
    hold.

    A fifth of each class is val, drawn once and for all; files of an earlier call are replaced.
    `limit` uses only that many images, evenly over the classes.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        DataError: the folder holds other files, or `limit` is too small.
    """
    datasets = optional_import("sklearn.datasets", "quickstart")
    if limit is not None and limit < MINIMUM:
        raise DataError(f"{limit} images are too few to learn and test ten digits; use {MINIMUM}")
    root = Path(root)
    _clear(root)
    digits = datasets.load_digits()
    rng = np.random.default_rng(0)
    counts = {"train": 0, "val": 0}
    bicubic = Image.Resampling.BICUBIC
    for label in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == label))
        if limit is not None:
            members = members[: limit // 10]
        held_out = round(len(members) * HELD_OUT)
        for split, chosen in (("val", members[:held_out]), ("train", members[held_out:])):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            counts[split] += len(chosen)
            for index in chosen:  # values run from 0 to 16
                gray = (digits.images[index] * (255 / 16)).round().astype(np.uint8)
                picture = Image.fromarray(gray).resize((PIXELS, PIXELS), bicubic)
                picture.save(folder / f"{index:04d}.png")
    return counts["train"], counts["val"]


def _clear(root: Path) -> None:
    if not root.exists():
        return
    files = [p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()]
    other = next((name for name in files if not OURS.fullmatch(name)), None)
    if other is not None:
        raise DataError(f"{root} holds {other}, which is not of the digits; give another folder")
    shutil.rmtree(root)
