"""What goes into a model: the size of images, random ones, and real ones."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from backbones.errors import ConfigError, DataError
from backbones.images import find_bad_images, image_mode, list_images

__all__ = [
    "Images",
    "check_input_size",
    "input_size_of",
    "load_images",
    "load_labels",
    "load_raw_images",
    "random_input",
]

Images = Union[Tensor, str, "PathLike[str]"]
_MOST = 256


def input_size_of(model: nn.Module, asked: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Return (channels, height, width) of what the model takes.

    Args:
        model: any model; its own input configuration counts where nothing is asked for.
        asked: ([channels,] height, width).

    Raises:
        ConfigError: `asked` is something else, or the model has other channels.
    """
    _, height, width = resolve_model_data_config(model)["input_size"]
    channels = getattr(model, "in_chans", None) or 3
    if asked is None:
        return (channels, height, width)
    check_input_size(asked)
    *own, height, width = asked
    if own and hasattr(model, "in_chans") and own[0] != channels:
        raise ConfigError(f"the model takes images of {channels} channels, not of {own[0]}")
    return (own[0] if own else channels, height, width)


def check_input_size(asked: Sequence[int]) -> None:
    """Raise :class:`ConfigError` unless `asked` is ([channels,] height, width)."""
    is_size = isinstance(asked, Sequence) and not isinstance(asked, str)
    if not is_size or len(asked) not in (2, 3) or min(asked) < 1:
        raise ConfigError(f"input_size must be ([channels,] height, width), got {asked!r}")


def load_images(images: Images, data_config: Mapping[str, Any], most: int = _MOST) -> Tensor:
    """Return images (N, C, H, W) as a model takes them.

    Args:
        images: a folder (or tar archive) of images in any depth of folders, of which `most` are
            taken, evenly spread; or a batch that is already normalized.
        data_config: the model's, for ``timm.data.create_transform``.
        most: how many at most.

    Raises:
        ConfigError: no folder, no image in it, or a batch of another size than the model takes.
        DataError: images that cannot be read, all named.
    """
    if isinstance(images, Tensor):
        size = tuple(data_config["input_size"])
        if images.ndim != 4 or not len(images) or images.shape[1:] != size:
            wanted = ", ".join(str(n) for n in size)
            raise ConfigError(
                f"calibration images must be (N, {wanted}), got {tuple(images.shape)}; resize them"
                " or give input_size"
            )
        return images[:most].detach().cpu().float()
    files, chosen = _chosen(images, most)
    mode, transform = image_mode(data_config["input_size"][0]), create_transform(**data_config)
    tensors: dict[str, Tensor] = {}

    def take(path: str) -> None:
        tensors[path] = transform(files.open(path, mode))

    if bad := find_bad_images(chosen, opener=take):
        raise DataError("\n       ".join(bad.values()))
    return torch.stack([tensors[path] for path in chosen])


def load_labels(images: Images, classes: Sequence[str] | None, most: int = _MOST) -> Tensor | None:
    """Return the classes (N,) of the images that `load_images` takes: of each the folder, in any
    depth, that has a class's name. None where some image is in no such folder."""
    if isinstance(images, Tensor) or not classes:
        return None
    numbers = {name: number for number, name in enumerate(classes)}
    _, chosen = _chosen(images, most)
    found = [[numbers[f] for f in path.split("/")[:-1] if f in numbers] for path in chosen]
    return torch.tensor([one[0] for one in found]) if all(found) else None


def load_raw_images(
    images: Images, data_config: Mapping[str, Any], size: Sequence[int] | None, most: int = _MOST
) -> Iterator[Tensor]:
    """Yield images, uint8 (B, H, W, C), as a file takes them that has the preprocessing in it.

    Photographs come one by one, as they differ in size; of normalized images (N, C, H, W) their
    gray levels come at once.

    Args:
        images: as for `load_images`, which tells what is wrong with them.
        data_config: the model's.
        size: (height, width) that photographs are scaled to; None leaves them as they are.
        most: how many at most.
    """
    if isinstance(images, Tensor):
        mean, std = (torch.tensor(data_config[key])[:, None, None] for key in ("mean", "std"))
        levels = (load_images(images, data_config, most) * std + mean) * 255
        yield levels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
        return
    files, chosen = _chosen(images, most)
    for path in chosen:
        photograph = files.open(path, image_mode(data_config["input_size"][0]))
        if size is not None:
            photograph = photograph.resize((size[1], size[0]))
        pixels = np.array(photograph)
        yield torch.from_numpy(pixels.reshape(1, *pixels.shape[:2], -1))


def _chosen(images: str | PathLike[str], most: int) -> tuple[Any, list[Any]]:
    """Return the images of a folder or archive, and those to take."""
    if not Path(images).exists():
        raise ConfigError(f"{images}: no such folder; give a folder of images")
    files = list_images(images)
    if not files.paths:
        raise ConfigError(f"{images}: no images in it")
    count = min(most, len(files))
    return files, [files.paths[i * len(files) // count] for i in range(count)]


def random_input(shape: Sequence[int], *, raw: bool = False) -> Tensor:
    """Return an input for images (B, C, H, W), the same in every call: values like those of
    normalized images, or uint8 (B, H, W, C) if `raw`."""
    generator = torch.Generator().manual_seed(0)
    if not raw:
        return torch.randn(*shape, generator=generator)
    batch, channels, height, width = shape
    return torch.randint(
        0, 256, (batch, height, width, channels), generator=generator, dtype=torch.uint8
    )
