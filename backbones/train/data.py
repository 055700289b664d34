"""Image folders (``root/train/<class>/*.png``) and their loaders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_loader, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

from backbones.train.config import TrainConfig
from backbones.train.images import DataError, open_image

__all__ = ["ImageFolder", "eval_loader", "image_folder", "set_input", "train_loader"]


class ImageFolder(ImageDataset):
    """timm's image dataset, except that an unreadable image is an error and not left out."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        return list(self.reader.class_to_idx)

    def path(self, index: int) -> Path:
        """Return the file of a sample."""
        return Path(self.filename(index, absolute=True))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.reader.samples[index]
        image = open_image(path, self.input_img_mode)
        return (image if self.transform is None else self.transform(image)), target


def image_folder(
    root: str | Path, split: str, *, classes: list[str] | None = None, in_chans: int = 3
) -> ImageFolder:
    """Open one split of an image folder, one sub-folder a class.

    Args:
        root: the folder that holds the splits.
        split: name of the split's folder.
        classes: the class names of the training split, to which this one must belong.
        in_chans: 1 for gray, 3 for color.

    Raises:
        DataError: no such folder, no images in it, or images of a class that training lacks.
    """
    folder = Path(root) / split
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected {folder}/<class>/<image> files")
    try:
        dataset = ImageFolder(folder, input_img_mode="L" if in_chans == 1 else "RGB")
    except RuntimeError as error:
        raise DataError(f"{folder}: {error}") from None
    if classes is None:
        return dataset
    extra = [name for name in dataset.classes if name not in classes]
    if extra:
        raise DataError(f"{folder}: classes that training does not have: {', '.join(extra)}")
    class_map = {name: i for i, name in enumerate(classes)}
    return ImageFolder(folder, class_map=class_map, input_img_mode=dataset.input_img_mode)


def set_input(model: nn.Module, size: int, *, crop_pct: float = 1.0) -> None:
    """Make `size` x `size` the input that timm's preprocessing and saved checkpoints state."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels = resolve_model_data_config(model)["input_size"][0]
    cfg |= {"input_size": (channels, size, size), "crop_pct": crop_pct, "pool_size": None}
    cfg |= {"test_input_size": None, "test_crop_pct": None, "num_classes": model.num_classes}


def train_loader(
    dataset: ImageFolder, config: TrainConfig, data_config: Mapping[str, Any]
) -> DataLoader:
    """Return shuffled, augmented batches (B, C, H, W); the rest of an epoch is dropped.

    Args:
        dataset: the training split.
        config: batch size and augmentation.
        data_config: the model's input, from ``timm.data.resolve_model_data_config``.
    """
    return create_loader(
        dataset,
        batch_size=min(config.batch_size, len(dataset)),
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=0.0,
        **_common(config.workers, data_config),
    )


def eval_loader(
    dataset: ImageFolder,
    data_config: Mapping[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> DataLoader:
    """Return batches in the dataset's order, with the preprocessing of inference."""
    return create_loader(
        dataset,
        batch_size=batch_size,
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        **_common(workers, data_config),
    )


def _common(workers: int, data_config: Mapping[str, Any]) -> dict[str, Any]:
    taken = {key: data_config[key] for key in ("input_size", "interpolation", "mean", "std")}
    # timm's prefetcher is for accelerators; without it the transform normalizes.
    return {
        **taken,
        "num_workers": workers,
        "use_prefetcher": False,
        "device": torch.device("cpu"),
    }
