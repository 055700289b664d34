"""From a model's number of channels to a kind of image and its normalization."""

from typing import Any

from backbones.errors import ConfigError

__all__ = ["fit_channels", "image_mode"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_mode(channels: int) -> str:
    """Return Pillow's mode of images with 1 (gray), 3 (RGB) or 4 channels (RGBA).

    Raises:
        ConfigError: another number; files cannot be read for such a model.
    """
    if channels not in _MODES:
        raise ConfigError(
            f"image files give 1 (gray), 3 (RGB) or 4 channels (RGBA), and the model takes"
            f" {channels}; pass it tensors (N, {channels}, H, W) that you normalize yourself"
        )
    return _MODES[channels]


def fit_channels(config: dict[str, Any], channels: int) -> dict[str, Any]:
    """Return an input configuration of timm's, as far as it is one, for a number of channels.

    Where mean and std are not of so many channels, each is the average of those there.
    """
    fitted = dict(config)
    for key, values in config.items():
        if values and key in ("input_size", "test_input_size"):
            fitted[key] = (channels, *values[1:])
        elif values and key in ("mean", "std"):
            average = (sum(values) / len(values),) * channels
            fitted[key] = tuple(values) if len(values) == channels else average
    return fitted
