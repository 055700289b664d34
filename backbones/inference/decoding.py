"""From an image to a row of a batch, as timm's preprocessing of the model gives it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor

from backbones.images import fit_channels, image_mode
from backbones.inference.sources import Item

__all__ = ["Decoder"]

_ROOM = 1.5  # below, what the fast decoding blurs would be seen


class Decoder:
    """Decodes images and puts them into batches; may be called from several threads.

    Args:
        data_config: the model's, from ``timm.data.resolve_model_data_config``.
        raw: the model takes decoded images of any size, (1, H, W, C) uint8.
        reduce: decode JPEGs at a half, a quarter or an eighth of their size, where that is still
            1.5 times the size that they are resized to.
    """

    def __init__(
        self, data_config: Mapping[str, Any], *, raw: bool = False, reduce: bool = False
    ) -> None:
        config = fit_channels(dict(data_config), data_config["input_size"][0])
        self.size = tuple(config["input_size"])
        self.mode = image_mode(self.size[0])
        self.raw = raw
        self._options: dict[str, Any] = {}
        if reduce and not raw:
            crop = config.get("crop_pct") or 1.0
            height, width = (math.ceil(_ROOM * side / crop) for side in self.size[1:])
            self._options["reduce_to"] = (height, width)
        # As for timm's prefetcher: without normalization, which is cheaper for a whole batch.
        self._transform = create_transform(**config, use_prefetcher=True)
        mean, std = (np.asarray(config[key], np.float32)[:, None, None] for key in ("mean", "std"))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def decode(self, item: Item) -> np.ndarray:
        """Return an image, uint8: (C, H, W), or (H, W, C) if `raw`.

        Raises:
            DataError: it cannot be read.
        """
        image = item.open(self.mode, **self._options)
        if self.raw:
            return np.array(image)
        return self._transform(image).numpy()

    def batch(self, images: Sequence[np.ndarray | None], size: int) -> Tensor:
        """Return normalized images (size, C, H, W); zeros where there is none.

        All batches have the same shape, for which engines are compiled.
        """
        batch = np.zeros((size, *self.size), np.float32)
        for place, image in zip(batch, images):
            if image is not None:
                np.multiply(image, self._scale, out=place)
                place += self._shift
        return torch.from_numpy(batch)
