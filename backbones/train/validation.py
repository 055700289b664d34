"""Accuracy of a model, or of an engine's runner: on batches, and on a folder with its classes."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from backbones.errors import DataError, MissingDependencyError
from backbones.files import write_csv, write_json
from backbones.images import list_images
from backbones.train.data import ImageFolder, eval_loader, exclude_bad, find_split, open_folder
from backbones.train.distributed import ProcessGroup
from backbones.train.plots import draw_confusion

__all__ = ["RESULTS", "Evaluation", "Validation", "evaluate", "validate", "write_validation"]

RESULTS = ("metrics.json", "per_class.csv", "confusion.csv", "confusion.png")
COLUMNS = ("class", "images", "correct", "accuracy")
WORST_SHOWN = 5  # classes


@dataclass(frozen=True)
class Evaluation:
    """Results on a whole split: `top1` and `top5` in percent, one row a sample in its order."""

    top1: float
    top5: float
    loss: float
    seconds: float
    logits: Tensor
    targets: Tensor

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.targets)

    @property
    def predictions(self) -> Tensor:
        """Index of the highest logit of each sample, (N,)."""
        return self.logits.argmax(dim=1)

    @property
    def correct(self) -> int:
        """Number of samples whose highest logit is the target's."""
        return int((self.predictions == self.targets).sum())


def evaluate(
    model: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]]
) -> Evaluation:
    """Run a model or an engine's runner over a split.

    Args:
        model: an `nn.Module` (run in eval mode, its mode restored) or any callable from images
            (B, C, H, W) to logits (B, classes).
        loader: batches in a fixed order, such as those of `eval_loader`.

    Raises:
        DataError: the loader is empty.
    """
    module = model if isinstance(model, nn.Module) else nn.Identity()
    first = next(module.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    was_training = module.training
    module.eval()
    start = time.perf_counter()
    logits, targets = [], []
    try:
        with torch.inference_mode():
            for images, target in loader:
                logits.append(model(images.to(device)).float().cpu())
                targets.append(target)
    finally:
        module.train(was_training)
    if not logits:
        raise DataError("nothing to evaluate: the loader gave no batch")
    seconds = time.perf_counter() - start
    # Out of inference mode, so that callers may compute with the result as they like.
    scores, labels = torch.cat(logits).clone(), torch.cat(targets).clone()
    top1, top5 = accuracy(scores, labels, topk=(1, 5))
    loss = F.cross_entropy(scores, labels)
    return Evaluation(float(top1), float(top5), float(loss), seconds, scores, labels)


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
        """Images, correct predictions and accuracy (percent; None without images) of each class."""
        confusion = self.confusion
        totals, correct = confusion.sum(dim=1).tolist(), confusion.diagonal().tolist()
        return [
            dict(zip(COLUMNS, (name, total, right, 100 * right / total if total else None)))
            for name, total, right in zip(self.classes, totals, correct)
        ]

    def __str__(self) -> str:
        result = self.evaluation
        lines = [
            f"{result.correct} of {result.count} right: {result.top1:.2f} % top-1,"
            f" {result.top5:.2f} % top-5, loss {result.loss:.4f},"
            f" {result.count / result.seconds:.0f} images/s",
            *(line if " left out" in line else f"left out: {line}" for line in self.skipped),
        ]
        present = [row for row in self.per_class if row["images"]]
        lines += [
            f"  {row['accuracy']:6.2f} %  {row['class']} ({row['correct']} of {row['images']})"
            for row in sorted(present, key=lambda row: row["accuracy"])[:WORST_SHOWN]
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        result = self.evaluation
        return {
            "images": result.count,
            **{name: getattr(result, name) for name in ("top1", "top5", "loss", "seconds")},
            "images_per_second": result.count / result.seconds,
            "skipped": self.skipped,
            "per_class": self.per_class,
        }


def validate(
    model: Callable[[Tensor], Tensor],
    data_dir: str | Path,
    data_config: Mapping[str, Any],
    *,
    split: str | None = None,
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
        data_dir: ``<data_dir>/<split>/<class>/<image>``, or ``<data_dir>/<class>/<image>``; a
            folder or a tar archive.
        data_config: the model's preprocessing, from ``timm.data.resolve_model_data_config`` or an
            exported file's metadata.
        split: name of the split's folder; by default the validation split, or all images where
            there are no splits.
        classes: the model's class names; the folder may hold fewer. None: those of ImageNet where
            the folders are called so, else the folder's, in order.
        num_classes: width of the logits, where it is known.
        skip_bad: leave unreadable images out instead of refusing them.
        device: where a module runs.

    Raises:
        DataError: no such folder or split, images that cannot be read, or classes the model does
            not know.
    """
    files = list_images(data_dir)
    inside = find_split(files, split or "validation", required=split is not None)
    dataset = open_folder(inside or files, in_chans=data_config["input_size"][0])
    names = _class_names(dataset, classes, num_classes, model)
    dataset.relabel(names)
    skipped = exclude_bad([dataset], skip=skip_bad)
    group = ProcessGroup(device or torch.device("cpu"))
    loader = eval_loader(dataset, data_config, batch_size=batch_size, workers=workers, group=group)
    bar = tqdm(loader, unit="batch", leave=False, disable=None)
    return Validation(evaluate(model, bar), names, [*files.left_out(), *skipped])


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
            f"{dataset.place} holds {len(found)} classes, the model knows {num_classes}, and"
            " it is not known which they are; use a checkpoint with class names in it, or name"
            " them (--class-names FILE)"
        )
    return found


def write_validation(result: Validation, folder: str | Path) -> list[Path]:
    """Write ``metrics.json``, ``per_class.csv``, ``confusion.csv`` and, with matplotlib,
    ``confusion.png``; return the files written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, per_class, confusion, picture = (folder / name for name in RESULTS)
    picture.unlink(missing_ok=True)
    write_json(metrics, result.as_dict())
    write_csv(per_class, [COLUMNS, *(list(row.values()) for row in result.per_class)])
    counts = zip(result.classes, result.confusion.tolist())
    head = ["true \\ predicted", *result.classes]
    write_csv(confusion, [head, *([name, *row] for name, row in counts)])
    try:
        draw_confusion(picture, result.confusion, result.classes)
    except MissingDependencyError:
        return [metrics, per_class, confusion]
    return [metrics, per_class, confusion, picture]
