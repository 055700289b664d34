"""Image folders as datasets: ``<split>/<class>/.../<image>``, or ``<class>/.../<image>``."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from backbones.errors import DataError
from backbones.images import ImageFiles, find_bad_images, image_mode, list_images, read_names, some

__all__ = [
    "ImageFolder",
    "exclude_bad",
    "find_split",
    "hold_out",
    "image_folder",
    "open_folder",
    "read_class_map",
]

SHOWN = 10  # names in a message
# Larger folders are not read through before use, unless bad images are to be skipped.
MOST_CHECKED = 50_000


class ImageFolder(Dataset):
    """Images of a folder or archive with the indices of their classes; an unreadable one is an
    error. timm's loader sets `transform`."""

    def __init__(
        self, files: ImageFiles, samples: Sequence[tuple[str, int]], classes: list[str], mode: str
    ) -> None:
        self.files, self.samples, self.classes, self.mode = files, list(samples), classes, mode
        self.transform: Callable[[Any], Any] | None = None

    @property
    def place(self) -> Path:
        """The folder, or the archive."""
        return self.files.place

    def path(self, index: int) -> Path:
        """Return the file of a sample."""
        return self.place / self.samples[index][0]

    def image(self, index: int) -> Any:
        """Return the picture of a sample as it is before any transform."""
        return self.files.open(self.samples[index][0], self.mode)

    def relabel(self, classes: Sequence[str]) -> None:
        """Count the classes as another dataset does; DataError for a class that it lacks."""
        extra = [name for name in self.classes if name not in classes]
        if extra:
            raise DataError(
                f"{self.place}: classes that training does not have: {some(extra, SHOWN)}"
            )
        indices = {name: i for i, name in enumerate(classes)}
        self.samples = [(path, indices[self.classes[target]]) for path, target in self.samples]
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return image if self.transform is None else self.transform(image), self.samples[index][1]


def find_split(files: ImageFiles, split: str, *, required: bool = False) -> ImageFiles | None:
    """Return the images of a split, under any of its usual names.

    None where there are no splits at all, unless one is `required`; that there are only others is a
    DataError.
    """
    found, there = files.split(split), files.split_folders
    if found is None and there:
        raise DataError(f"{files.place}: no split {split!r}; it holds {', '.join(there)}")
    if found is None and required:
        raise DataError(
            f"{files.place}: no split {split!r}, and none at all; its folders are"
            f" {some(files.folders, SHOWN) or 'none'}. Without the option, all images count"
        )
    return found


def image_folder(
    root: str | Path, split: str, *, classes: Sequence[str] | None = None, in_chans: int = 3
) -> ImageFolder:
    """Open one split of an image folder, one sub-folder a class.

    Args:
        root: the folder that holds the splits, or a tar archive.
        split: name of the split's folder; ``validation`` also finds ``val`` and so on.
        classes: the class names of the training split, to which this one must belong.
        in_chans: 1 for gray, 3 for color, 4 with an alpha channel.

    Raises:
        DataError: no such folder, no images in it or in a class, images beside the class folders,
            or images of a class that training lacks.
    """
    found = find_split(list_images(root), split, required=True)
    assert found is not None
    return open_folder(found, classes=classes, in_chans=in_chans)


def open_folder(
    files: ImageFiles,
    *,
    classes: Sequence[str] | None = None,
    class_map: str = "",
    in_chans: int = 3,
) -> ImageFolder:
    """Make a dataset of class folders: the uppermost folder is the class, whatever lies deeper.

    `class_map` is a text file of class names in the order of their indices; see `image_folder` for
    the other arguments and the errors.
    """
    mode = image_mode(in_chans)
    if not files.paths:
        raise DataError(f"{files.place}: no images in it; expected <class>/<image> files")
    loose = [path for path in files.paths if "/" not in path]
    if loose:
        raise DataError(f"{files.place}: images outside of class folders: {some(loose, SHOWN)}")
    filled = {path.partition("/")[0] for path in files.paths}
    names = [name for name in files.folders if name in filled]
    empty = [name for name in files.folders if name not in filled]
    if class_map:
        names = read_class_map(class_map, files, names)
    elif empty and classes is None:
        raise DataError(
            f"{files.place}: no images in {some(empty, SHOWN)}; remove or fill these folders"
        )
    indices = {name: i for i, name in enumerate(names)}
    samples = [(path, indices[path.partition("/")[0]]) for path in files.paths]
    dataset = ImageFolder(files, samples, names, mode)
    if classes is not None:
        dataset.relabel(classes)
    return dataset


def read_class_map(
    path: str | Path, files: ImageFiles | None = None, folders: Sequence[str] = ()
) -> list[str]:
    """Return the class names of a text file (`read_names`), in the order of their indices.

    Blank lines do not matter. Each name stands there once, and for one of the `folders` of `files`
    where these are given; otherwise it is a DataError.
    """
    path = Path(path)
    if files is not None and not path.exists():  # as timm looks for it
        path = next(
            (p for p in (files.place / path, files.place.parent / path) if p.exists()), path
        )
    names = [name for name in read_names(path) if name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: {some(twice, SHOWN)} stands there twice")
    if files is None:
        return names
    problems = {
        "lines without a folder of images": [name for name in names if name not in folders],
        "folders without a line": [name for name in folders if name not in names],
    }
    told = [f"{what}: {some(which, SHOWN)}" for what, which in problems.items() if which]
    if told:
        raise DataError(f"{path} does not fit {files.place}: {'; '.join(told)}")
    return names


def hold_out(dataset: ImageFolder, fraction: float) -> ImageFolder:
    """Take a share of each class out of a dataset and return it as another one.

    The choice depends on the files' names alone, so that every run makes the same. A class with
    one image keeps it; that all do is a DataError.
    """
    members = defaultdict(list)
    for sample in dataset.samples:
        members[sample[1]].append(sample)
    held_out: set[str] = set()
    for samples in members.values():
        count = min(max(round(len(samples) * fraction), 1), len(samples) - 1)
        held_out |= {path for path, _ in random.Random(0).sample(samples, count)}
    if not held_out:
        raise DataError(
            f"{dataset.place}: one image a class, so that none can be held out for validation; add"
            " images or a folder val/, or train without validation (--val-split '')"
        )
    chosen = [sample for sample in dataset.samples if sample[0] in held_out]
    dataset.samples = [sample for sample in dataset.samples if sample[0] not in held_out]
    return ImageFolder(dataset.files, chosen, dataset.classes, dataset.mode)


def exclude_bad(
    datasets: Sequence[ImageFolder],
    *,
    skip: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Decode every image once, leave bad ones out, and return what is wrong with each.

    More than 50,000 images are read through only with `skip`; `progress` is called with how many
    are done, and of how many. Bad images without `skip`, all named, or a class of nothing else, are
    a DataError.
    """
    items = [(dataset, path) for dataset in datasets for path, _ in dataset.samples]
    if not skip and len(items) > MOST_CHECKED:
        return []
    bad = find_bad_images(
        items, progress, opener=lambda item: item[0].files.open(item[1], item[0].mode)
    )
    if bad and not skip:
        lines = "\n       ".join(bad.values())
        raise DataError(f"{lines}\n       --skip-bad (skip_bad=True) goes on without them")
    for dataset in datasets:
        good = [sample for sample in dataset.samples if (dataset, sample[0]) not in bad]
        lost = {target for _, target in dataset.samples} - {target for _, target in good}
        if lost:
            names = [dataset.classes[target] for target in sorted(lost)]
            raise DataError(f"{dataset.place}: no readable images are left of {some(names, SHOWN)}")
        dataset.samples = good
    return list(bad.values())
