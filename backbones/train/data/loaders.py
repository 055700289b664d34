"""Batches of images, prepared as a model needs them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import create_loader, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from backbones.errors import ConfigError, DataError
from backbones.images import fit_channels
from backbones.train.config import TrainConfig
from backbones.train.distributed import ProcessGroup

__all__ = ["eval_loader", "set_input", "train_loader"]

SINGLE_PROCESS = ProcessGroup(torch.device("cpu"))


def set_input(model: nn.Module, size: int | Sequence[int] | None = None, **facts: Any) -> None:
    """Change the input that timm's preprocessing and saved checkpoints state of a model.

    `size` is the side of the images, or height and width; `facts` are `crop_pct`, `mean`, `std` and
    `interpolation`; None keeps the model's.

    Raises:
        ConfigError: a mean or std of another number of channels.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    known = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", None) or known["input_size"][0]
    shape = known["input_size"]
    if size:
        cfg |= {"pool_size": None, "test_input_size": None, "test_crop_pct": None}
        shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
    given = {key: value for key, value in facts.items() if value is not None}
    for key in {"mean", "std"} & given.keys():
        if len(given[key]) not in (1, channels):
            raise ConfigError(f"{key} must be one number or {channels}, got {given[key]}")
    cfg |= {"num_classes": model.num_classes, **given}
    stated = {key: cfg.get(key) or known[key] for key in ("mean", "std")}
    cfg |= fit_channels({**stated, "input_size": shape}, channels)


def train_loader(
    dataset: Dataset,
    config: TrainConfig,
    data_config: Mapping[str, Any],
    group: ProcessGroup = SINGLE_PROCESS,
) -> Any:
    """Return shuffled, augmented batches (B, C, H, W); the rest of an epoch is dropped.

    The order depends on seed and epoch alone: a step's images are the same for one process and for
    several, of which each takes its share. `data_config` is the model's input, from
    ``timm.data.resolve_model_data_config``.
    """
    batch_size, iterable = config.batch_size, isinstance(dataset, IterableDataset)
    if not iterable:
        batch_size = min(batch_size, len(dataset) // group.size)  # type: ignore[arg-type]
    if config.mixes:
        batch_size -= batch_size % 2  # timm mixes pairs
    if batch_size < 1:
        raise DataError("nothing to train on: fewer images than processes")
    # timm's changes of color know gray and RGB.
    colors = data_config["input_size"][0] != 4
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
        color_jitter=config.color_jitter if colors else None,
        auto_augment=config.aa if colors else None,
        interpolation=data_config["interpolation"] if config.no_aug else config.train_interpolation,
        num_workers=config.workers,
        pin_memory=config.pin_mem,
        # Fresh workers each epoch, whose randomness then depends on seed and epoch alone.
        persistent_workers=False,
        **_common(data_config, group.device),
    )
    if iterable:
        return loader
    inner = getattr(loader, "loader", loader)  # inside of timm's prefetcher
    kept = ("num_workers", "collate_fn", "worker_init_fn", "pin_memory")
    ordered: DataLoader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DistributedSampler(
            dataset, group.size, group.rank, seed=config.seed, drop_last=True
        ),
        drop_last=True,
        **{name: getattr(inner, name) for name in kept},
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
    group: ProcessGroup = SINGLE_PROCESS,
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
        distributed=group.distributed,
        **_common(data_config, group.device),
    )


def _common(data_config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    taken = {key: data_config[key] for key in ("input_size", "mean", "std")}
    # timm's prefetcher is for GPUs; without it the transform normalizes.
    return {**taken, "use_prefetcher": device.type == "cuda", "device": device}
