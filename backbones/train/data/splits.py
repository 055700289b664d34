"""The training and validation images of a run, from folders or any of timm's dataset readers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from backbones.errors import ConfigError
from backbones.train.config import TrainConfig
from backbones.train.data.folders import exclude_bad, hold_out, open_folder, split_folder
from backbones.train.data.images import DataError

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
            place = f"dataset {config.dataset or config.data_dir!r}, split {split!r}"
            raise DataError(f"{place}: {error}") from error

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
