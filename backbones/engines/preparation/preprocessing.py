"""Preprocessing as a part of the graph: decoded images in, what the model expects out.

timm's validation transform resizes the shorter side to ``size / crop_pct`` with an antialiasing
filter and cuts out the center. Both are linear and separable, so that one matrix a side does them:
row i holds the filter's weights around the place in the image that output i comes from. The
matrices are computed in the graph from the image's size by plain operations, which every
format knows and which leave the size free.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import UnsupportedError

__all__ = ["Preprocessed", "resize_matrix"]

KNOWN = {"interpolation": ("bilinear", "bicubic"), "crop_mode": ("center", "squash")}


class Preprocessed(nn.Module):
    """A model with its preprocessing before it: uint8 images (B, H, W, C) of any size.

    The result differs from Pillow's by its rounding to whole gray levels only; with ``squash``,
    where one side shrinks while the other grows, some versions of Pillow also cut off overshoots
    in the other order.

    Args:
        model: images (B, C, size, size) to outputs.
        config: what ``timm.data.resolve_model_data_config`` gives for it.

    Raises:
        UnsupportedError: a filter or crop mode that has no matrix here.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.filter = str(config["interpolation"])
        self.crop_mode = str(config.get("crop_mode") or "center")
        for what, value in (("interpolation", self.filter), ("crop_mode", self.crop_mode)):
            if value not in KNOWN[what]:
                raise UnsupportedError(
                    f"{what} {value!r} cannot be put into the graph; one of"
                    f" {', '.join(KNOWN[what])} can (model.pretrained_cfg[{what!r}])"
                )
        _, self.height, self.width = config["input_size"]
        self.crop_pct = float(config.get("crop_pct") or 1.0)
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        # (value / 255 - mean) / std in one multiplication and one addition
        self.register_buffer("scale", (1 / (255 * std)).reshape(1, -1, 1, 1))
        self.register_buffer("shift", (-mean / std).reshape(1, -1, 1, 1))
        self.data_config = config
        self.model = model

    def forward(self, images: Tensor) -> Any:
        height, width = images.shape[1], images.shape[2]
        tall, wide = self.resized(height, width)
        x = images.permute(0, 3, 1, 2).float()
        rows = resize_matrix(height, tall, self.height, self.filter, x)
        columns = resize_matrix(width, wide, self.width, self.filter, x)
        # Pillow resizes rows first and stores gray levels, so that overshoots are cut off twice.
        x = (x @ columns.transpose(0, 1)).clamp(0, 255)
        x = (rows @ x).clamp(0, 255)
        return self.model(x * self.scale + self.shift)

    def alone(self) -> "Preprocessed":
        """Return the preprocessing without the model: it gives normalized images (B, C, H, W)."""
        return Preprocessed(nn.Identity(), self.data_config).eval()

    def resized(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Return the image's height and width after timm's resizing, before its center crop."""
        tall = math.floor(self.height / self.crop_pct)
        wide = math.floor(self.width / self.crop_pct)
        if self.crop_mode == "squash":
            return tall, wide
        if tall == wide:  # torchvision's Resize rounds the longer side down
            return torch.sym_max(tall, tall * height // width), torch.sym_max(
                wide, wide * width // height
            )
        # timm's ResizeKeepRatio rounds it to the nearest
        return (
            torch.sym_max(tall, (2 * height * wide + width) // (2 * width)),
            torch.sym_max(wide, (2 * width * tall + height) // (2 * height)),
        )


def resize_matrix(size: Any, resized: Any, out: int, filter: str, like: Tensor) -> Tensor:
    """Return the matrix (out, size) that resizes one side and takes the center of the result.

    The image has `size` pixels along this side, and `resized` after resizing, at least `out`. The
    filter is ``bilinear`` or ``bicubic`` (Keys' kernel with a = -0.5, as Pillow's); rows that reach
    beyond the image use its part inside, as Pillow does.
    """
    margin = resized - out
    first = (margin + margin // 2 % 2) // 2  # half of it, halves rounded to even
    centers = (torch.arange(out, dtype=like.dtype, device=like.device) + 0.5 + first) * size
    pixels = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    t = (pixels[None, :] * resized - centers[:, None]).abs()
    # Enlarging needs no antialiasing, so the filter is never narrower than a pixel.
    t = t / torch.sym_max(size, resized)
    weights = _bicubic(t) if filter == "bicubic" else (1 - t).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def _bicubic(t: Tensor) -> Tensor:
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    zero = torch.zeros_like(t)
    return torch.where(t < 1, near, torch.where(t < 2, far, zero))
