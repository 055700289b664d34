"""Heat maps of what counted for a class, by the package grad-cam."""

import copy
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from backbones.errors import ConfigError, UnsupportedError, nearest
from backbones.files import new_file
from backbones.inference.decoding import Decoder
from backbones.inference.models import class_names
from backbones.inference.rows import Row
from backbones.inference.sources import Item
from backbones.optional import optional_import
from backbones.wrappers import unwrapped

__all__ = ["Explainer"]


class _InTwo(nn.Module):
    """A model whose last feature map passes a layer of its own, where its values and gradients can
    be seen; the blocks of some families have no layer that gives it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.feature_map = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        model: Any = self.model
        maps = model.forward_features(x)  # B C H W
        if maps.ndim != 4:
            raise UnsupportedError(
                f"{type(model).__name__} gives features of shape {tuple(maps.shape)}, which are no"
                " feature map (B, C, H, W)"
            )
        return model.forward_head(self.feature_map(maps))


class Explainer:
    """Draws heat maps over images as the model sees them.

    Args:
        model: a classifier; stays as it is.
        data_config: its preprocessing, from ``timm.data.resolve_model_data_config``.
        method: ``gradcam`` (Selvaraju et al. 2017: the feature map's channels weighted by the mean
            gradient of the class), or ``eigencam`` (Muhammad and Yeasin 2020: the first principal
            component of the feature map, without gradients and for no class in particular).
        target: name or index of the class; None for the likeliest one of each image.

    Raises:
        MissingDependencyError: grad-cam is not installed.
        ConfigError: no such class.
        UnsupportedError: the model has no feature map.
    """

    METHODS = ("gradcam", "eigencam")

    def __init__(
        self,
        model: nn.Module,
        data_config: Mapping[str, Any],
        *,
        method: str = "gradcam",
        target: str | int | None = None,
    ) -> None:
        if method not in self.METHODS:
            raise ConfigError(f"no method {method!r}; there are {', '.join(self.METHODS)}")
        cam = optional_import("pytorch_grad_cam", "explain")
        inner = unwrapped(model)
        if not (hasattr(inner, "forward_features") and hasattr(inner, "forward_head")):
            raise UnsupportedError(f"{type(inner).__name__} has no feature map to explain by")
        self.target = _index_of(target, class_names(inner), getattr(inner, "num_classes", None))
        split = _InTwo(copy.deepcopy(inner).cpu().float().eval())
        kind = cam.GradCAM if method == "gradcam" else cam.EigenCAM
        self._cam = kind(model=split, target_layers=[split.feature_map])
        self._targets = optional_import("pytorch_grad_cam.utils.model_targets", "explain")
        self._show = optional_import("pytorch_grad_cam.utils.image", "explain").show_cam_on_image
        self._decoder = Decoder(data_config)

    def heat_map(self, images: Tensor, classes: list[int]) -> np.ndarray:
        """Return maps (B, H, W) from 0 to 1 for normalized images (B, C, H, W) and a class each."""
        targets = [self._targets.ClassifierOutputTarget(index) for index in classes]
        with torch.enable_grad():
            return self._cam(input_tensor=images, targets=targets)

    def write(self, item: Item, row: Row, folder: Path) -> Path:
        """Write an image with its heat map as PNG below a folder, and return its path.

        Raises:
            DataError: the image cannot be read.
            OSError: the file cannot be written.
        """
        pixels = self._decoder.decode(item)  # C H W
        index = row.predictions[0].index if self.target is None else self.target
        (heat,) = self.heat_map(self._decoder.batch([pixels], 1), [index])
        shown = np.asarray(_as_rgb(pixels), np.float32) / 255
        path = Path(folder, PurePosixPath(item.relative).with_suffix(".png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            Image.fromarray(self._show(shown, heat, use_rgb=True)).save(file)
        return path


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) of an image of 1, 3 or 4 channels (C, H, W)."""
    colors = pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, axis=0)
    return colors.transpose(1, 2, 0)


def _index_of(target: str | int | None, names: list[str] | None, count: int | None) -> int | None:
    if target is None:
        return None
    if isinstance(target, str) and names and target in names:
        return names.index(target)
    if str(target).isdigit() and (count is None or int(target) < count):
        return int(target)
    hint = nearest(str(target), names or ()) or f"; give a name, or an index below {count}"
    raise ConfigError(f"no class {target!r}{hint}")
