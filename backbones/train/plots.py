"""Pictures of results."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from backbones.optional import new_figure
from backbones.train.data import ImageFolder

__all__ = ["draw_confusion", "draw_curves", "draw_predictions"]

COLUMNS = 10
NAMED_CLASSES = 40  # above, a confusion matrix is colors alone


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
        targets: true ones (N,).
        classes: names of the classes.
        count: how many images; the correct ones are taken evenly over the split.
        title: headline.

    Raises:
        MissingDependencyError: matplotlib is not installed, as from all functions here.
    """
    wrong = (predictions != targets).nonzero().flatten().tolist()[:count]
    right = (predictions == targets).nonzero().flatten().tolist()
    step = max(1, len(right) // max(1, count - len(wrong)))
    shown = (wrong + right[::step])[:count]
    rows = math.ceil(len(shown) / COLUMNS)
    with new_figure(path, COLUMNS * 1.1, rows * 1.4 + 0.6) as figure:
        figure.suptitle(title)
        for axes, index in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, shown):
            predicted, target = int(predictions[index]), int(targets[index])
            mistake = predicted != target
            color = "crimson" if mistake else "darkgreen"
            axes.imshow(dataset.image(index), **({"cmap": "gray"} if dataset.mode == "L" else {}))
            label = f"predicted {classes[predicted]}\ntrue {classes[target]}"
            axes.set_title(f"{label}  \u2717" if mistake else label, fontsize=8, color=color)
            for spine in axes.spines.values():
                spine.set(color=color, linewidth=3 if mistake else 0.5)
            axes.set(xticks=[], yticks=[])
        for axes in figure.axes[len(shown) :]:
            axes.set_visible(False)


def draw_curves(path: str | Path, summary: str | Path) -> None:
    """Draw losses and accuracy over the epochs of a run, from its ``summary.csv``."""
    with Path(summary).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    epochs = [int(row["epoch"]) + 1 for row in rows]
    with new_figure(path, 9, 3.6) as figure:
        losses, accuracies = figure.subplots(1, 2)
        curves = (
            (losses, "train_loss", "training"),
            (losses, "eval_loss", "validation"),
            (accuracies, "eval_top1", "top-1"),
            (accuracies, "eval_top5", "top-5"),
        )
        for axes, key, label in curves:
            values = [float(row[key]) for row in rows if row.get(key)]
            if values:
                axes.plot(epochs[-len(values) :], values, marker=".", label=label)
        losses.set(xlabel="epoch", ylabel="loss")
        accuracies.set(xlabel="epoch", ylabel="validation accuracy (%)")
        for axes in (losses, accuracies):
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()


def draw_confusion(path: str | Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Draw counts (classes, classes), rows are true classes, each as shares of its class."""
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(12.0, 3 + 0.35 * len(classes))
    with new_figure(path, side, side) as figure:
        axes = figure.subplots()
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="true")
        if len(classes) <= NAMED_CLASSES:
            axes.set_xticks(range(len(classes)), classes, rotation=90)
            axes.set_yticks(range(len(classes)), classes)
            for row, column in confusion.nonzero().tolist():
                color = "white" if shares[row, column] > 0.5 else "black"
                style = {"ha": "center", "va": "center", "color": color, "fontsize": 7}
                axes.text(column, row, str(int(confusion[row, column])), **style)
