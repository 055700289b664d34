"""The training and validation images of a run, from folders or any of timm's dataset readers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.data import create_dataset

from backbones.errors import ConfigError, DataError
from backbones.images import image_mode, list_images, some
from backbones.train.config import TrainConfig
from backbones.train.data.folders import (
    SHOWN,
    exclude_bad,
    find_split,
    hold_out,
    open_folder,
    read_class_map,
)

__all__ = ["Splits", "open_splits"]


@dataclass(frozen=True)
class Splits:
    """The images of a run, what their classes are called, and what people should know of them."""

    train: Any
    val: Any | None
    classes: list[str] | None
    notes: tuple[str, ...] = ()


def open_splits(config: TrainConfig, progress: Callable[[int, int], None] | None = None) -> Splits:
    """Open the training and validation images that a config names; `progress` is called while
    they are checked, with how many are done, and of how many.

    Raises:
        DataError: there are none, images that cannot be read, or splits that do not fit together.
        ConfigError: `data_dir` is missing.
    """
    if config.dataset:
        return _other_readers(config)
    if not config.data_dir:
        raise ConfigError("data_dir is missing; name a folder of images (--data-dir FOLDER)")
    files, channels = list_images(config.data_dir), config.in_chans or 3
    notes = files.left_out()
    inside = find_split(files, config.train_split, required=config.train_split != "train")
    train = open_folder(inside or files, class_map=config.class_map, in_chans=channels)
    if len(train.classes) < 2:
        name = train.classes[0]
        raise DataError(f"{train.place}: one class only ({name}); training needs two or more")
    held_back = None if inside is None or not config.val_split else files.split(config.val_split)
    if held_back is None and config.val_split not in ("", "validation"):
        find_split(files, config.val_split, required=True)
    if held_back is not None and held_back.place == train.place:
        raise DataError(f"{train.place} cannot be both the training and the validation split")
    val = None
    if held_back is not None:
        val = open_folder(held_back, classes=train.classes, in_chans=channels)
    elif config.val_split and config.val_fraction:
        val = hold_out(train, config.val_fraction)
        notes.append(
            f"no validation images in {files.place}: {len(val)} of {len(train) + len(val)} are"
            " held out"
        )
    present = [train] if val is None else [train, val]
    if inside is not None:
        used = {dataset.place.name for dataset in present}
        unused = [folder for folder in files.folders if folder not in used]
        notes += [f"not used: {some(unused, SHOWN)} in {files.place}"] if unused else []
    if channels == 4 and not config.no_aug and (config.aa or config.color_jitter):
        notes.append("color_jitter and aa are for gray and RGB images, and are left out for RGBA")
    bad = exclude_bad(present, skip=config.skip_bad, progress=progress)
    notes += [f"left out: {problem}" for problem in bad]
    return Splits(train, val, train.classes, tuple(notes))


def _other_readers(config: TrainConfig) -> Splits:
    """Open what timm's dataset factory can."""
    if "/" not in config.dataset:
        raise ConfigError(
            f"no dataset reader {config.dataset!r}; there are those of timm, such as"
            " 'torch/cifar10' and 'hfds/owner/name'; leave it out for folders and archives"
        )
    names = read_class_map(config.class_map) if config.class_map else []

    def read(split: str, is_training: bool) -> Any:
        try:
            return create_dataset(
                config.dataset,
                root=config.data_dir or None,
                split=split,
                is_training=is_training,
                class_map={name: i for i, name in enumerate(names)} or None,
                download=config.dataset_download,
                batch_size=config.batch_size,
                seed=config.seed,
                input_img_mode=image_mode(config.in_chans or 3),
                input_key=config.input_key,
                target_key=config.target_key,
            )
        except (AssertionError, RuntimeError, ValueError, OSError, ImportError) as error:
            place = f"dataset {config.dataset or config.data_dir!r}, split {split!r}"
            raise DataError(f"{place}: {error}") from error

    train = read(config.train_split, True)
    val = read(config.val_split, False) if config.val_split else None
    # A reader that finds no such split takes the whole folder for each.
    samples = getattr(getattr(train, "reader", train), "samples", None)
    if samples and samples == getattr(getattr(val, "reader", val), "samples", None):
        raise DataError(
            f"{config.data_dir}: splits {config.train_split!r} and {config.val_split!r} are the"
            " same images; leave --dataset out to hold some out, or train without validation"
            " (--val-split '')"
        )
    return Splits(train, val, _class_names(train))


def _class_names(dataset: Any) -> list[str] | None:
    """Return a dataset's class names in order, where it knows them."""
    indices = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if isinstance(indices, Mapping):
        return [str(name) for name in sorted(indices, key=indices.__getitem__)]
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if names else None
