"""Validation on a folder of images: accuracy, confusion matrix, accuracy of each class."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from tqdm import tqdm

from backbones.errors import MissingDependencyError
from backbones.train.data import CHECKED_AT_ONCE, eval_loader
from backbones.train.distributed import World
from backbones.train.evaluation import Evaluation, evaluate
from backbones.train.folders import ImageFolder, exclude_bad, open_folder, split_folder
from backbones.train.images import DataError
from backbones.train.plots import draw_confusion

__all__ = ["RESULTS", "Validation", "validate", "write_validation"]

RESULTS = ("metrics.json", "per_class.csv", "confusion.csv", "confusion.png")


@dataclass(frozen=True)
class Validation:
    """What a model got right and wrong on a folder of images."""

    evaluation: Evaluation
    classes: list[str]
    skipped: list[str]

    @property
    def confusion(self) -> Tensor:
        """Counts (classes, classes): rows are true classes, columns predicted ones."""
        count, result = len(self.classes), self.evaluation
        cells = result.targets * count + result.predictions
        return torch.bincount(cells, minlength=count * count).reshape(count, count)

    @property
    def per_class(self) -> list[dict[str, Any]]:
        """Images, right answers and accuracy (percent; None without images) of each class."""
        confusion = self.confusion
        totals, right = confusion.sum(dim=1).tolist(), confusion.diagonal().tolist()
        return [
            {
                "class": name,
                "images": total,
                "correct": correct,
                "accuracy": 100 * correct / total if total else None,
            }
            for name, total, correct in zip(self.classes, totals, right)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        result = self.evaluation
        return {
            "images": result.count,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "seconds": result.seconds,
            "images_per_second": result.count / result.seconds,
            "skipped": self.skipped,
            "per_class": self.per_class,
        }


def validate(
    model: Callable[[Tensor], Tensor],
    data_dir: str | Path,
    data_config: Mapping[str, Any],
    *,
    split: str = "validation",
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    skip_bad: bool = False,
    device: torch.device | None = None,
) -> Validation:
    """Run a model, or an engine's runner, over a folder of images.

    Args:
        model: an `nn.Module` or any callable from images (B, C, H, W) to logits (B, classes).
        data_dir: ``<data_dir>/<split>/<class>/<image>``, or ``<data_dir>/<class>/<image>``.
        data_config: the model's preprocessing, from ``timm.data.resolve_model_data_config`` or an
            exported file's metadata.
        split: name of the split's folder.
        classes: the model's class names; the folder may hold fewer. None: those of ImageNet where
            the folders are called so, else the folder's, in order.
        num_classes: width of the logits, where it is known.
        batch_size: images a call.
        workers: processes that load images.
        skip_bad: leave unreadable images out instead of refusing them.
        device: where a module runs.

    Raises:
        DataError: no such folder, images that cannot be read, or classes the model does not know.
    """
    root = Path(data_dir)
    folder = split_folder(root, split) or root
    if not folder.is_dir():
        raise DataError(f"{root}: no such folder; give one that holds <class>/<image>")
    channels = data_config["input_size"][0]
    dataset = open_folder(folder, in_chans=channels)
    names = _class_names(dataset, classes, num_classes, model)
    dataset.relabel(names)
    skipped: list[str] = []
    if skip_bad or len(dataset) <= CHECKED_AT_ONCE:
        skipped = exclude_bad([dataset], skip=skip_bad)
    world = World(device or torch.device("cpu"))
    loader = eval_loader(dataset, data_config, batch_size=batch_size, workers=workers, world=world)
    bar = tqdm(loader, unit="batch", leave=False, disable=None)
    return Validation(evaluate(model, bar), names, skipped)


def _class_names(
    dataset: ImageFolder,
    classes: Sequence[str] | None,
    num_classes: int | None,
    model: Any,
) -> list[str]:
    found = dataset.classes
    if classes is not None:
        return list(classes)
    if isinstance(model, nn.Module) and (subset := infer_imagenet_subset(model)):
        synsets = ImageNetInfo(subset).label_names()
        if set(found) <= set(synsets):
            return synsets
    if num_classes is not None and len(found) != num_classes:
        raise DataError(
            f"{dataset.reader.root} holds {len(found)} classes, the model knows {num_classes}, and"
            " it is not known which they are; use a checkpoint with class names in it"
        )
    return found


def write_validation(result: Validation, folder: str | Path) -> list[Path]:
    """Write ``metrics.json``, ``per_class.csv``, ``confusion.csv`` and ``confusion.png``.

    The picture needs matplotlib and is left out without it.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, per_class, confusion, picture = (folder / name for name in RESULTS)
    picture.unlink(missing_ok=True)
    _write(metrics, json.dumps(result.as_dict(), indent=2) + "\n")
    table = result.per_class
    _write(per_class, _csv([list(table[0]), *(list(row.values()) for row in table)]))
    rows = [["true \\ predicted", *result.classes]]
    rows += [[name, *row] for name, row in zip(result.classes, result.confusion.tolist())]
    _write(confusion, _csv(rows))
    try:
        draw_confusion(picture, result.confusion, result.classes)
    except MissingDependencyError:
        return [metrics, per_class, confusion]
    return [metrics, per_class, confusion, picture]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
