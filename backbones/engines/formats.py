"""The formats that a model can leave in: a typed config each, and who converts and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines.runners import Runner
from backbones.errors import ExportError, UnsupportedError, nearest

__all__ = [
    "Conversion",
    "Format",
    "FormatConfig",
    "Notes",
    "available_formats",
    "file_suffixes",
    "find_format",
    "open_exported",
    "register",
    "summary",
    "traced",
]


@dataclass(frozen=True)
class FormatConfig:
    """Options of one target format."""


@dataclass(frozen=True)
class Conversion:
    """What is converted: a merged model in eval mode on the CPU, and all that the file must know.

    `example` is an input; `dynamic` names the dimensions that stay free; `raw` means uint8 images
    (B, H, W, C); `outputs` names the outputs; `calibration` are images for int8, as the model
    takes them.
    """

    model: nn.Module
    example: Tensor
    dynamic: tuple[str, ...] = ("batch",)
    raw: bool = False
    outputs: tuple[str, ...] = ("logits",)
    precision: str = "fp32"
    calibration: Tensor | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> dict[int, str]:
        """The free dimensions of the input: their position and name."""
        positions = {"batch": 0, "height": 1, "width": 2} if self.raw else AXES
        return {positions[name]: name for name in self.dynamic}


Notes = Mapping[str, Any]
AXES = {"batch": 0, "height": 2, "width": 3}


@dataclass(frozen=True)
class Format:
    """A registered format."""

    name: str
    suffix: str
    config_class: type[FormatConfig]
    convert: Callable[[Conversion, Any, Path], Notes | None]
    """(conversion, config, path) -> writes the file, and others beside it where it needs them;
    notes are what the report should tell besides."""
    open: Callable[..., Runner]
    """(path, threads=None) -> the file, ready to run."""
    precisions: tuple[str, ...] = ("fp32",)
    dynamic: tuple[str, ...] = ("batch", "height", "width")


_formats: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make a format available to `export`."""
    _formats[format.name] = format


def available_formats() -> list[str]:
    """Return the names of the formats that `export` can write."""
    return sorted(_formats)


def file_suffixes() -> list[str]:
    """Return the suffixes of the files that can be opened."""
    return [_formats[name].suffix for name in available_formats()]


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
        UnsupportedError: no such format.
    """
    available = ", ".join(available_formats())
    if isinstance(wanted, FormatConfig):
        for format in _formats.values():
            if type(wanted) is format.config_class:
                return format, wanted
        raise UnsupportedError(f"no format takes {type(wanted).__name__}; available: {available}")
    if wanted is None:
        by_suffix = {format.suffix: format.name for format in _formats.values()}
        if path.suffix not in by_suffix:
            raise UnsupportedError(
                f"{path}: the suffix names no format; use {', '.join(file_suffixes())}, or pass"
                f" format=... (available: {available})"
            )
        wanted = by_suffix[path.suffix]
    if wanted not in _formats:
        raise UnsupportedError(
            f"no format {wanted!r}{nearest(wanted, _formats)}; available: {available}"
        )
    return _formats[wanted], _formats[wanted].config_class()


def traced(conversion: Conversion, limits: Mapping[str, int] | None = None) -> Any:
    """Return the model as ``torch.export`` records it, free dimensions as asked for.

    Args:
        conversion: what is converted.
        limits: largest value of a free dimension, by name, for formats that need one.

    Raises:
        ExportError: the model cannot be recorded.
    """
    bounds = limits or {}
    shapes: dict[int, Any] = {
        axis: torch.export.Dim(name, max=bounds[name])
        if name in bounds
        else torch.export.Dim.DYNAMIC
        for axis, name in conversion.axes.items()
    }
    try:
        with torch.no_grad():
            return torch.export.export(
                conversion.model,
                (conversion.example,),
                dynamic_shapes=(shapes or None,),
                # What cannot be decided for all sizes is checked when the program runs.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except Exception as error:  # whatever a model's code raises while it is recorded
        raise ExportError(f"torch.export cannot record the model: {summary(error)}") from error


def summary(error: BaseException) -> str:
    """Return the first line of an exporter's message, which may be pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
