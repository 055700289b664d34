"""Real images for calibration and for agreement figures."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Union

import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor

from backbones.errors import ConfigError

__all__ = ["Images", "load_images"]

Images = Union[Tensor, str, "PathLike[str]"]
MOST = 256


def load_images(images: Images, data_config: Mapping[str, Any], most: int = MOST) -> Tensor:
    """Return images (N, C, H, W) as a model takes them.

    Args:
        images: a folder of images in any depth of folders, of which `most` are taken, evenly
            spread; or a batch that is already normalized.
        data_config: the model's, for ``timm.data.create_transform``.
        most: how many at most.

    Raises:
        ConfigError: no folder, or no image in it.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or not len(images):
            raise ConfigError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
        return images[:most].detach().cpu().float()
    folder = Path(images)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a folder of images")
    mode = "L" if data_config["input_size"][0] == 1 else "RGB"
    dataset: Any = create_dataset(
        "", root=str(folder), transform=create_transform(**data_config), input_img_mode=mode
    )
    if not len(dataset):
        raise ConfigError(f"{folder}: no images in it")
    count = min(most, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    try:
        return torch.stack([dataset[i][0] for i in chosen])
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{folder}: an image in it cannot be read ({error})") from error
