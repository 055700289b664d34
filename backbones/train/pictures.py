"""Pictures of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from backbones.errors import MissingDependencyError
from backbones.train.data import ImageFolder
from backbones.train.images import open_image

__all__ = ["draw_predictions"]

COLUMNS = 10


def draw_predictions(
    path: str | Path,
    dataset: ImageFolder,
    predictions: Tensor,
    targets: Tensor,
    *,
    classes: Sequence[str],
    count: int = 60,
    title: str = "",
) -> None:
    """Draw images with predicted and true labels into a picture file; mistakes come first, in red.

    Args:
        path: the picture; its suffix gives the format.
        dataset: the evaluated split, in order.
        predictions: predicted class indices (N,).
        targets: true class indices (N,).
        classes: names of the classes.
        count: how many images; the correct ones are taken evenly over the split.
        title: headline.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'pictures need matplotlib; pip install "backbones[plot]"'
        ) from error
    wrong = (predictions != targets).nonzero().flatten().tolist()[:count]
    right = (predictions == targets).nonzero().flatten().tolist()
    step = max(1, len(right) // max(1, count - len(wrong)))
    shown = (wrong + right[::step])[:count]
    rows = math.ceil(len(shown) / COLUMNS)
    # A Figure of its own needs no display and leaves pyplot's state alone.
    figure = Figure(figsize=(COLUMNS * 1.1, rows * 1.4 + 0.6), layout="constrained")
    figure.suptitle(title)
    for axes, index in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, shown):
        predicted, target = int(predictions[index]), int(targets[index])
        mistake = predicted != target
        color = "crimson" if mistake else "darkgreen"
        axes.imshow(open_image(dataset.path(index)))
        label = f"predicted {classes[predicted]}\ntrue {classes[target]}"
        axes.set_title(f"{label}  \u2717" if mistake else label, fontsize=8, color=color)
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=3 if mistake else 0.5)
        axes.set(xticks=[], yticks=[])
    for axes in figure.axes[len(shown) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)
