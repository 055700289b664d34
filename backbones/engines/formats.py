"""The formats that a model can leave in: a typed config each, and who converts and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from backbones.engines.runners import Runner
from backbones.errors import UnsupportedError, nearest

__all__ = [
    "Format",
    "FormatConfig",
    "OnnxConfig",
    "available_formats",
    "file_suffixes",
    "find_format",
    "open_exported",
    "register",
]

# Every format the package is planned for, with its file's suffix; `register` makes one available.
SUFFIXES = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "pt2": ".pt2",
    "aoti": ".aoti",
    "executorch": ".pte",
}


@dataclass(frozen=True)
class FormatConfig:
    """Options of one target format."""


@dataclass(frozen=True)
class OnnxConfig(FormatConfig):
    """ONNX by PyTorch's exporter over `torch.export`; `opset` None is the exporter's own choice."""

    opset: int | None = None


# (model, example input, names of dynamic dimensions, config, metadata, path) -> writes the file.
Convert = Callable[[nn.Module, Tensor, Sequence[str], Any, Mapping[str, Any], Path], None]


@dataclass(frozen=True)
class Format:
    """A registered format."""

    name: str
    config_class: type[FormatConfig]
    convert: Convert
    open: Callable[..., Runner]
    """(path, threads=None) -> the file, ready to run."""


_formats: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make a format available to `export`."""
    _formats[format.name] = format


def available_formats() -> list[str]:
    """Return the names of the formats that `export` can write."""
    return sorted(_formats)


def file_suffixes() -> list[str]:
    """Return the suffixes of the files that can be opened."""
    return [SUFFIXES[name] for name in available_formats()]


def open_exported(path: str | PathLike[str], *, threads: int | None = None) -> Runner:
    """Open an exported file in the engine for its format, which the suffix names.

    Args:
        path: the file.
        threads: threads of one call; None for PyTorch's number.

    Raises:
        UnsupportedError: no format has this suffix.
        BackbonesError: the engine is not installed or cannot load the file.
    """
    path = Path(path)
    return find_format(None, path)[0].open(path, threads=threads)


def find_format(wanted: str | FormatConfig | None, path: Path) -> tuple[Format, FormatConfig]:
    """Return the format asked for by name or config, or else by the path's suffix.

    Raises:
        UnsupportedError: no such format, or none that this version can write.
    """
    available = ", ".join(available_formats())
    if isinstance(wanted, FormatConfig):
        for format in _formats.values():
            if type(wanted) is format.config_class:
                return format, wanted
        raise UnsupportedError(f"no format takes {type(wanted).__name__}; available: {available}")
    if wanted is None:
        by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
        if path.suffix not in by_suffix:
            known = ", ".join(SUFFIXES[name] for name in available_formats())
            raise UnsupportedError(
                f"{path}: the suffix names no format; use {known}, or pass format=..."
                f" (available: {available})"
            )
        wanted = by_suffix[path.suffix]
    if wanted not in _formats:
        reason = (
            f"format {wanted!r} cannot be written yet"
            if wanted in SUFFIXES
            else f"no format {wanted!r}{nearest(wanted, SUFFIXES)}"
        )
        raise UnsupportedError(f"{reason}; available: {available}")
    return _formats[wanted], _formats[wanted].config_class()
