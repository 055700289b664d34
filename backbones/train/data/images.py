"""Opening images of strangers."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

from PIL import Image, ImageOps

from backbones.errors import BackbonesError

__all__ = ["DataError", "find_bad_images", "open_image"]

MOST_THREADS = 8


class DataError(BackbonesError, ValueError):
    """Images or image folders that cannot be used; the message names them."""


def open_image(path: str | PathLike[str], mode: str = "RGB") -> Image.Image:
    """Read and decode an image file, upright as its EXIF data say, in a color mode of Pillow's.

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


def find_bad_images(
    paths: Sequence[str | PathLike[str]], progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """Decode images and return what is wrong with each bad one, by path; `progress` is called
    with how many are done, and of how many."""

    def problem(path: str | PathLike[str]) -> str | None:
        try:
            open_image(path)
        except DataError as error:
            return str(error)
        return None

    bad: dict[str, str] = {}
    # Pillow decodes outside of the interpreter's lock.
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for done, (path, found) in enumerate(zip(paths, pool.map(problem, paths)), start=1):
            if found is not None:
                bad[str(path)] = found
            if progress is not None:
                progress(done, len(paths))
    return bad
