"""One image file: decoded, upright, in 8 bits a channel."""

import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import BinaryIO, TypeVar, Union

import numpy as np
from PIL import Image, ImageOps

from backbones.errors import ConfigError, DataError

__all__ = ["convert_image", "find_bad_images", "open_image"]

Item = TypeVar("Item")
_MOST_THREADS = 8
_LIMIT = "BACKBONES_MAX_MEGAPIXELS"
# What values may reach: of gray images deeper than 8 bits, the least of these that holds them all.
_WHOLE_RANGES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16, 24, 32))
_REAL_RANGES = (1, 255, 65535)
# Pillow keeps the upper 8 of 16 bits of colors; below this, 14 bits or fewer were in use.
_DARK = 64


def open_image(
    source: Union[str, "PathLike[str]", BinaryIO],
    mode: str = "RGB",
    *,
    name: str | PathLike[str] | None = None,
    reduce_to: tuple[int, int] | None = None,
) -> Image.Image:
    """Read and decode an image, upright as its EXIF data say.

    Gray images of more than 8 bits are scaled: black is 0, and white is the end of the smallest
    usual range that holds their largest value: 8, 10, 12, 14, 16, 24 or 32 bits for whole numbers;
    1, 255 or 65,535 for floating-point ones. Of colors in 16 bits the upper 8 count. Images of more
    than 179 megapixels are refused unless the environment variable BACKBONES_MAX_MEGAPIXELS allows
    them (0: any).

    Args:
        source: path, or a binary stream.
        mode: Pillow's, such as L, RGB or RGBA.
        name: what messages call a stream.
        reduce_to: (height, width); a JPEG that is twice as large or more may be decoded at a half,
            a quarter or an eighth of its size that still reaches this on both sides.

    Raises:
        DataError: no such file, no image, a damaged or too large one, or values with no range.
    """
    name = Path(name or source)  # type: ignore[arg-type]
    if not hasattr(source, "read") and not name.is_file():
        raise DataError(f"{name}: {'a folder' if name.is_dir() else 'no such file'}; give an image")
    _set_limit()
    try:
        with Image.open(source) as image:  # type: ignore[arg-type]
            if reduce_to is not None:
                image.draft(None, (max(reduce_to), max(reduce_to)))  # type: ignore[arg-type]
            return convert_image(image, mode)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{name}: not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: {_too_large(error)}") from None
    # Pillow's decoders raise what they like on damaged files (struct.error, SyntaxError, ...).
    except Exception as error:
        raise DataError(f"{name}: damaged or cut short ({error}); fetch it again") from error


def convert_image(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Return an image upright and in 8 bits a channel, as `open_image` does.

    Raises:
        DataError: values of which it is not known what is black and white.
    """
    halved = any(";16" in str(part[-1]) for part in getattr(image, "tile", ()))
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        upright = _in_8_bits(upright)
    elif halved and 0 < np.asarray(upright.convert("RGB")).max() < _DARK:
        raise DataError("16-bit colors that use 14 bits or fewer; convert it to 8 bits")
    return upright.convert(mode)


def find_bad_images(
    items: Sequence[Item],
    progress: Callable[[int, int], None] | None = None,
    *,
    opener: Callable[[Item], object] = open_image,  # type: ignore[assignment]
) -> dict[Item, str]:
    """Decode images and return what is wrong with each bad one; `progress` is called with how many
    are done, and of how many, and `opener` decodes one item (a path, unless it says otherwise)."""

    def problem(item: Item) -> str | None:
        try:
            opener(item)
        except DataError as error:
            return str(error)
        return None

    bad: dict[Item, str] = {}
    # Pillow decodes outside of the interpreter's lock.
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for done, (item, found) in enumerate(zip(items, pool.map(problem, items)), start=1):
            if found is not None:
                bad[item] = found
            if progress is not None:
                progress(done, len(items))
    return bad


def _in_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    whole = values.dtype.kind != "f"
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    ranges = _WHOLE_RANGES if whole else _REAL_RANGES
    white = next((end for end in ranges if high <= end), None)  # no comparison holds for nan
    if white is None or not low >= 0:
        raise DataError(
            f"values from {low:g} to {high:g}, of which it is not known what is black and white;"
            " convert it to 8 or 16 bits"
        )
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _set_limit() -> None:
    """Have Pillow allow what the environment does; it refuses twice its limit."""
    text = os.environ.get(_LIMIT)
    if text is None:
        return
    try:
        most = float(text)
    except ValueError:
        most = -1.0
    if not 0 <= most < math.inf:
        raise ConfigError(f"{_LIMIT} must be a number of megapixels, or 0 for any; it is {text!r}")
    Image.MAX_IMAGE_PIXELS = math.ceil(most * 1e6 / 2) or None


def _too_large(error: Exception) -> str:
    found = re.search(r"\((\d+) pixels\)", str(error))
    millions = math.ceil(int(found[1]) / 1e6) if found else 0
    size = f"{millions} megapixels are" if millions else "it is"
    return (
        f"{size} more than is read without being asked to; if you trust the file, set the"
        f" environment variable {_LIMIT}={millions}"
    )
