"""Image folders: ``root/<split>/<class>/<image>``, or ``root/<class>/<image>`` without splits."""

import os
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageDataset

from backbones.train.data.images import DataError, find_bad_images, open_image

__all__ = ["ImageFolder", "exclude_bad", "hold_out", "image_folder", "open_folder", "split_folder"]

SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))
SHOWN = 10  # names in a message
# Larger folders are not read through before use, unless bad images are to be skipped.
MOST_CHECKED = 50_000


class ImageFolder(ImageDataset):
    """timm's image dataset, except that an unreadable image is an error and not left out."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        indices = self.reader.class_to_idx
        return sorted(indices, key=indices.__getitem__)

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and class index of every image."""
        return self.reader.samples

    def path(self, index: int) -> Path:
        """Return the file of a sample."""
        return Path(self.samples[index][0])

    def relabel(self, classes: Sequence[str]) -> None:
        """Count the classes as another dataset does; DataError for a class that it lacks."""
        before, root = self.classes, self.reader.root
        extra = [name for name in before if name not in classes]
        if extra:
            raise DataError(f"{root}: classes that training does not have: {_some(extra)}")
        indices = {name: i for i, name in enumerate(classes)}
        self.restrict([(path, indices[before[target]]) for path, target in self.samples])
        self.reader.class_to_idx = indices

    def restrict(self, samples: Sequence[tuple[str, int]]) -> None:
        """Keep only these samples; the classes stay."""
        self.reader.samples = list(samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        image = open_image(path, self.input_img_mode)
        return (image if self.transform is None else self.transform(image)), target


def split_folder(root: str | Path, split: str) -> Path | None:
    """Return the sub-folder of a split, also under its other usual names; None without one."""
    names = next((kin for kin in SYNONYMS if split in kin), ())
    for name in (split, *names):
        if name and (Path(root) / name).is_dir():
            return Path(root) / name
    return None


def image_folder(
    root: str | Path, split: str, *, classes: Sequence[str] | None = None, in_chans: int = 3
) -> ImageFolder:
    """Open one split of an image folder, one sub-folder a class.

    Args:
        root: the folder that holds the splits.
        split: name of the split's folder; ``validation`` also finds ``val`` and so on.
        classes: the class names of the training split, to which this one must belong.
        in_chans: 1 for gray, 3 for color.

    Raises:
        DataError: no such folder, no images in it or in a class, images beside the class folders,
            or images of a class that training lacks.
    """
    folder, named = split_folder(root, split), Path(root) / split
    if folder is None:
        raise DataError(f"{named}: no such folder; expected {named}/<class>/<image> files")
    return open_folder(folder, classes=classes, in_chans=in_chans)


def open_folder(
    folder: Path, *, classes: Sequence[str] | None = None, class_map: str = "", in_chans: int = 3
) -> ImageFolder:
    """Open a folder of class folders; see `image_folder` for arguments and errors."""
    mode = "L" if in_chans == 1 else "RGB"
    try:
        dataset = ImageFolder(folder, class_map=class_map, input_img_mode=mode)
    except (RuntimeError, OSError, AssertionError) as error:
        raise DataError(f"{folder}: {error}") from None
    loose = [path for path, _ in dataset.samples if Path(path).parent == folder]
    if loose:
        raise DataError(f"{folder}: images outside of class folders: {_some(loose)}")
    start = len(str(folder)) + 1
    filled = {path[start:].partition(os.sep)[0] for path, _ in dataset.samples}
    empty = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name not in filled)
    if empty and classes is None and not class_map:
        raise DataError(f"{folder}: no images in {_some(empty)}; remove or fill these folders")
    if classes is not None:
        dataset.relabel(classes)
    return dataset


def hold_out(dataset: ImageFolder, fraction: float) -> ImageFolder:
    """Take a share of each class out of a dataset and return it as another one.

    The choice depends on the files' names alone, so that every run makes the same. A class with
    one image keeps it.
    """
    members = defaultdict(list)
    for sample in dataset.samples:
        members[sample[1]].append(sample)
    held_out: set[str] = set()
    for samples in members.values():
        count = min(max(round(len(samples) * fraction), 1), len(samples) - 1)
        held_out |= {path for path, _ in random.Random(0).sample(samples, count)}
    other = ImageFolder(
        dataset.reader.root,
        class_map=dataset.reader.class_to_idx,
        input_img_mode=dataset.input_img_mode,
    )
    other.restrict([sample for sample in dataset.samples if sample[0] in held_out])
    dataset.restrict([sample for sample in dataset.samples if sample[0] not in held_out])
    return other


def exclude_bad(
    datasets: Sequence[ImageFolder],
    *,
    skip: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Decode every image once, leave bad ones out, and return what is wrong with each.

    More than 50,000 images are read through only with `skip`; `progress` is called with how many
    are done, and of how many.

    Raises:
        DataError: bad images without `skip`, all named, or a split of nothing but bad images.
    """
    paths = [path for dataset in datasets for path, _ in dataset.samples]
    if not skip and len(paths) > MOST_CHECKED:
        return []
    bad = find_bad_images(paths, progress)
    if bad and not skip:
        lines = "\n       ".join(bad.values())
        raise DataError(f"{lines}\n       --skip-bad (skip_bad=True) goes on without them")
    for dataset in datasets:
        good = [sample for sample in dataset.samples if sample[0] not in bad]
        lost = {target for _, target in dataset.samples} - {target for _, target in good}
        if lost:
            names = [dataset.classes[target] for target in sorted(lost)]
            raise DataError(f"{dataset.reader.root}: no readable images are left of {_some(names)}")
        dataset.restrict(good)
    return list(bad.values())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
