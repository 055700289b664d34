"""A linear probe: how well a classifier on a backbone's embeddings tells classes apart."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from backbones.errors import DataError
from backbones.inference import embed
from backbones.optional import optional_import
from backbones.train.config import TrainConfig
from backbones.train.data import open_splits

__all__ = ["Probe", "probe"]


@dataclass(frozen=True)
class Probe:
    """Accuracy in percent of a classifier on embeddings of `features` channels.

    `chance` is that of naming the most frequent class; `seconds` are those of both splits.
    """

    top1: float
    train_top1: float
    chance: float
    features: int
    train_images: int
    images: int
    classes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"linear probe: {self.top1:.2f} % top-1 on {self.images} images of {self.classes}"
            f" classes ({self.train_top1:.2f} % on the {self.train_images} that it was fitted to,"
            f" {self.chance:.2f} % by chance), {self.features} features, {self.seconds:.0f} s"
        ]
        return "\n".join([*lines, *self.notes])


def probe(
    model: nn.Module,
    data_dir: str | Path,
    *,
    train_split: str = "train",
    val_split: str = "validation",
    skip_bad: bool = False,
    progress: Callable[[], None] | None = None,
    **options: Any,
) -> Probe:
    """Fit a logistic regression to embeddings of the training images, and measure it on others.

    Embeddings are standardized, and the regression is scikit-learn's with its own regularization.

    Args:
        model: a classifier; its own classes do not matter.
        data_dir: as for training: a folder or archive with splits, or class folders, of which a
            fifth is then held out.
        train_split, val_split: names of the splits.
        skip_bad: leave unreadable images out instead of refusing them.
        progress: called for each image.
        options: those of `backbones.embed`.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        DataError: there are no such images, or not of two classes.
        BackbonesError: as for `backbones.embed`.
    """
    linear = optional_import("sklearn.linear_model", "quickstart")
    pipeline = optional_import("sklearn.pipeline", "quickstart")
    scaling = optional_import("sklearn.preprocessing", "quickstart")
    config = TrainConfig(
        data_dir=str(data_dir),
        train_split=train_split,
        val_split=val_split,
        skip_bad=skip_bad,
        in_chans=getattr(model, "in_chans", None) or 3,
    )
    splits = open_splits(config)
    if splits.val is None:
        raise DataError(f"{data_dir}: no images to measure on")
    began = time.perf_counter()
    both = (splits.train, splits.val)
    files = [replace(one.files, paths=tuple(path for path, _ in one.samples)) for one in both]
    found: list[Any] = []
    for row in embed(files, model, strict=True, **options):
        found.append(row.embedding)
        if progress is not None:
            progress()
    seconds = time.perf_counter() - began
    count = len(splits.train)
    x, x_val = np.stack(found[:count]), np.stack(found[count:])
    y, y_val = (np.array([target for _, target in one.samples]) for one in both)
    fitted = pipeline.make_pipeline(
        scaling.StandardScaler(), linear.LogisticRegression(max_iter=1000)
    ).fit(x, y)
    return Probe(
        top1=100 * float(fitted.score(x_val, y_val)),
        train_top1=100 * float(fitted.score(x, y)),
        chance=100 * float((y_val == np.bincount(y).argmax()).mean()),
        features=x.shape[1],
        train_images=len(y),
        images=len(y_val),
        classes=len(splits.classes or ()),
        seconds=seconds,
        notes=splits.notes,
    )
