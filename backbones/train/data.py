"""Datasets and loaders of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from backbones.errors import ConfigError
from backbones.train.config import TrainConfig
from backbones.train.distributed import World
from backbones.train.folders import (
    exclude_bad,
    hold_out,
    open_folder,
    split_folder,
)
from backbones.train.images import DataError

__all__ = ["Splits", "eval_loader", "open_splits", "set_input", "train_loader"]

# Larger folders are not read through before training starts, unless bad images are to be skipped.
CHECKED_AT_ONCE = 50_000
ALONE = World(torch.device("cpu"))


@dataclass(frozen=True)
class Splits:
    """The images of a run, what their classes are called, and what people should know of them."""

    train: Any
    val: Any | None
    classes: list[str] | None
    notes: tuple[str, ...] = ()


def open_splits(config: TrainConfig, progress: Callable[[int, int], None] | None = None) -> Splits:
    """Open the training and validation images that a config names.

    Args:
        config: `data_dir` and what else concerns data.
        progress: called while images are checked, with how many are done, and of how many.

    Raises:
        DataError: there are none, images that cannot be read, or splits that do not fit together.
        ConfigError: `data_dir` is missing.
    """
    if config.dataset or Path(config.data_dir).is_file():
        return _other_readers(config)
    if not config.data_dir:
        raise ConfigError("data_dir is missing; name a folder of images (--data-dir FOLDER)")
    root, channels = Path(config.data_dir), config.in_chans or 3
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give one that holds <split>/<class>/<image>")
    notes = []
    folder = split_folder(root, config.train_split)
    other = split_folder(root, config.val_split) if config.val_split else None
    if folder is None and other is not None:
        raise DataError(f"{root} holds {other.name} but no folder {config.train_split!r}")
    train = open_folder(folder or root, class_map=config.class_map, in_chans=channels)
    if len(train.classes) < 2:
        name = train.classes[0]
        raise DataError(f"{folder or root}: one class only ({name}); training needs two or more")
    val = None
    if other is not None:
        val = open_folder(other, classes=train.classes, in_chans=channels)
    elif config.val_split:
        val = hold_out(train, config.val_fraction)
        notes.append(
            f"no validation images in {root}: {len(val)} of {len(train) + len(val)} are held out"
        )
    present = [train] if val is None else [train, val]
    if config.skip_bad or sum(map(len, present)) <= CHECKED_AT_ONCE:
        bad = exclude_bad(present, skip=config.skip_bad, progress=progress)
        notes += [f"left out: {problem}" for problem in bad]
    return Splits(train, val, train.classes, tuple(notes))


def _other_readers(config: TrainConfig) -> Splits:
    """Open what timm's dataset factory can."""

    def read(split: str, is_training: bool) -> Any:
        try:
            return create_dataset(
                config.dataset,
                root=config.data_dir or None,
                split=split,
                is_training=is_training,
                class_map=config.class_map or None,
                download=config.dataset_download,
                batch_size=config.batch_size,
                seed=config.seed,
                input_img_mode="L" if config.in_chans == 1 else "RGB",
                input_key=config.input_key,
                target_key=config.target_key,
            )
        except (AssertionError, RuntimeError, ValueError, OSError, ImportError) as error:
            name = config.dataset or config.data_dir
            raise DataError(f"dataset {name!r}, split {split!r}: {error}") from error

    train = read(config.train_split, True)
    val = read(config.val_split, False) if config.val_split else None
    return Splits(train, val, _class_names(train))


def _class_names(dataset: Any) -> list[str] | None:
    """Return a dataset's class names in order, where it knows them."""
    indices = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if isinstance(indices, Mapping):
        return [str(name) for name in sorted(indices, key=indices.__getitem__)]
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if names else None


def set_input(model: nn.Module, size: int | None = None, **facts: Any) -> None:
    """Change the input that timm's preprocessing and saved checkpoints state.

    Args:
        model: a model with `pretrained_cfg`.
        size: side of the images; None keeps the model's.
        facts: `crop_pct`, `mean`, `std`, `interpolation`; None keeps the model's.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    known = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", None) or known["input_size"][0]
    shape = (channels, size, size) if size else (channels, *known["input_size"][1:])
    if size:
        cfg |= {"pool_size": None, "test_input_size": None, "test_crop_pct": None}
    cfg |= {"input_size": shape, "num_classes": model.num_classes}
    cfg |= {key: value for key, value in facts.items() if value is not None}
    for key in ("mean", "std"):
        values = tuple(cfg.get(key) or known[key])
        if len(values) not in (1, channels):
            values = (sum(values) / len(values),)
        cfg[key] = values if len(values) == channels else values * channels


def train_loader(
    dataset: Dataset,
    config: TrainConfig,
    data_config: Mapping[str, Any],
    world: World = ALONE,
) -> Any:
    """Return shuffled, augmented batches (B, C, H, W); the rest of an epoch is dropped.

    The order depends on seed and epoch alone: a step's images are the same for one process and for
    several, of which each takes its share.

    Args:
        dataset: the training split.
        config: batch size and augmentation.
        data_config: the model's input, from ``timm.data.resolve_model_data_config``.
        world: the processes that share the images.
    """
    batch_size, iterable = config.batch_size, isinstance(dataset, IterableDataset)
    if not iterable:
        batch_size = min(batch_size, len(dataset) // world.size)  # type: ignore[arg-type]
    if config.mixes:
        batch_size -= batch_size % 2  # timm mixes pairs
    if batch_size < 1:
        raise DataError("nothing to train on: fewer images than processes")
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        is_training=True,
        no_aug=config.no_aug,
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        train_crop_mode=config.train_crop_mode,
        scale=tuple(config.scale),
        ratio=tuple(config.ratio),
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.aa,
        interpolation=data_config["interpolation"] if config.no_aug else config.train_interpolation,
        num_workers=config.workers,
        pin_memory=config.pin_mem,
        # Fresh workers each epoch, whose randomness then depends on seed and epoch alone.
        persistent_workers=False,
        **_common(data_config, world.device),
    )
    if iterable:
        return loader
    inner = getattr(loader, "loader", loader)  # inside of timm's prefetcher
    ordered: DataLoader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DistributedSampler(
            dataset, world.size, world.rank, seed=config.seed, drop_last=True
        ),
        drop_last=True,
        num_workers=inner.num_workers,
        collate_fn=inner.collate_fn,
        worker_init_fn=inner.worker_init_fn,
        pin_memory=inner.pin_memory,
    )
    if loader is inner:
        return ordered
    loader.loader = ordered
    return loader


def eval_loader(
    dataset: Dataset,
    data_config: Mapping[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
    pin_mem: bool = False,
    world: World = ALONE,
) -> Any:
    """Return batches in the dataset's order, with the preprocessing of inference."""
    return create_loader(
        dataset,
        batch_size=batch_size,
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        interpolation=data_config["interpolation"],
        num_workers=workers,
        pin_memory=pin_mem,
        persistent_workers=False,
        distributed=world.distributed,
        **_common(data_config, world.device),
    )


def _common(data_config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    taken = {key: data_config[key] for key in ("input_size", "mean", "std")}
    # timm's prefetcher is for GPUs; without it the transform normalizes.
    return {**taken, "use_prefetcher": device.type == "cuda", "device": device}
