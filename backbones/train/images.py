"""Opening images of strangers."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from PIL import Image, ImageOps

from backbones.errors import BackbonesError

__all__ = ["DataError", "open_image"]


class DataError(BackbonesError, ValueError):
    """Images or image folders that cannot be used; the message names them."""


def open_image(path: str | PathLike[str], mode: str = "RGB") -> Image.Image:
    """Read and decode an image file, upright as its EXIF data say.

    Args:
        path: the file.
        mode: Pillow's name of the color mode to convert to.

    Raises:
        DataError: there is no such file, it is no image, or it is damaged or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give an image")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not an image that Pillow can read") from None
    # Pillow's decoders raise what they like on damaged files (struct.error, SyntaxError, ...).
    except Exception as error:
        raise DataError(f"{path}: damaged or cut short ({error}); fetch it again") from error
