"""export(): convert, run the file in its engine, compare, and only then put it in place."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The import registers the format.
import backbones.engines.onnx_format  # noqa: F401
from backbones.engines.agreement import Agreement, compare
from backbones.engines.formats import FormatConfig, find_format
from backbones.engines.metadata import describe, input_size_of
from backbones.errors import ConfigError, ExportError, UnsupportedError

__all__ = ["ExportReport", "export"]

DYNAMIC = ("batch", "height", "width")
TOLERANCE = {"fp32": 1e-4}  # largest difference over the output's largest magnitude


@dataclass(frozen=True)
class Check:
    """One comparison of the exported file with the model, on an input (B, C, H, W)."""

    shape: tuple[int, ...]
    agreement: Agreement


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how well it agrees with the model."""

    path: Path
    format: str
    precision: str
    input_size: tuple[int, ...]
    dynamic: tuple[str, ...]
    bytes: int
    seconds: float
    engine: str | None
    checks: tuple[Check, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def export(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    format: str | FormatConfig | None = None,
    input_size: Sequence[int] | None = None,
    dynamic: Sequence[str] = ("batch",),
    precision: str = "fp32",
    verify: bool = True,
    classes: Sequence[str] | None = None,
) -> ExportReport:
    """Write `model` in a deployment format, proved equal to the model.

    The file is run in its engine and compared with the model on random images, for two batch sizes
    and, where height and width are dynamic, two sizes. It appears at `path` only if it agrees. The
    model itself stays as it is; what leaves is a copy in eval mode on the CPU.

    Args:
        model: a classifier, images (B, C, H, W) to logits (B, classes).
        path: where the file goes; its folder must exist, an old file is replaced.
        format: a format's name or config; None for that of the path's suffix.
        input_size: (channels, height, width); None for the model's own.
        dynamic: which dimensions stay free: of ``batch``, ``height`` and ``width``.
        precision: ``fp32``.
        verify: False leaves the comparison out.
        classes: names of the classes, written into the file.

    Raises:
        UnsupportedError: a format, precision or kind of model that cannot be exported.
        ConfigError: an unknown dynamic dimension, or the path's folder does not exist.
        MissingDependencyError: an optional package is needed.
        ExportError: the conversion failed, or the file does not compute what the model computes;
            no file is left, and one that was there before is untouched.
    """
    start, path = time.perf_counter(), Path(path)
    target, config = find_format(format, path)
    if precision not in TOLERANCE:
        raise UnsupportedError(
            f"precision {precision!r} cannot be exported; available: {', '.join(TOLERANCE)}"
        )
    unknown = [name for name in dynamic if name not in DYNAMIC]
    if unknown:
        raise ConfigError(f"no dynamic dimension {unknown[0]!r}; there are {', '.join(DYNAMIC)}")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path}: give a file in a folder that exists")
    size = input_size_of(model) if input_size is None else tuple(input_size)
    clone = copy.deepcopy(model).cpu().float().eval()
    example = random_images((2 if "batch" in dynamic else 1, *size))
    if not isinstance(run(clone, example), Tensor):
        raise UnsupportedError("only models that return one tensor can be exported")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        file = Path(folder) / path.name
        target.convert(clone, example, dynamic, config, describe(model, size, classes), file)
        engine, checks = None, []
        if verify:
            runner = target.open(file)
            engine = runner.engine
            for shape in shapes_to_check(size, dynamic):
                checks.append(check(clone, runner, shape, TOLERANCE[precision], path))
            del runner  # some systems do not move a file that is open
        written = file.stat().st_size
        os.replace(file, path)
    return ExportReport(
        path=path,
        format=target.name,
        precision=precision,
        input_size=size,
        dynamic=tuple(dynamic),
        bytes=written,
        seconds=time.perf_counter() - start,
        engine=engine,
        checks=tuple(checks),
    )


def shapes_to_check(size: Sequence[int], dynamic: Sequence[str]) -> list[tuple[int, ...]]:
    """Return input shapes that differ from the example's in every dynamic dimension."""
    channels, height, width = size
    other_height = height + 32 if "height" in dynamic else height
    other_width = width + 64 if "width" in dynamic else width
    shapes: list[tuple[int, ...]] = [(1, channels, height, width)]
    if "batch" in dynamic:
        shapes.append((5, channels, height, width))
    if (other_height, other_width) != (height, width):
        shapes.append((1, channels, other_height, other_width))
    return shapes


def check(
    model: nn.Module,
    runner: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    tolerance: float,
    path: Path,
) -> Check:
    """Compare runner and model on random images of a shape.

    Raises:
        ExportError: they differ by more than `tolerance`, relative to the output's magnitude.
    """
    images = random_images(shape)
    expected, output = run(model, images), runner(images)
    try:
        agreement = compare(expected, output)
    except ExportError as error:
        raise ExportError(f"{path}: input {shape}: {error}; no file was written") from None
    if agreement.relative_error > tolerance:
        at = agreement.worst
        raise ExportError(
            f"{path}: the exported file does not compute what the model computes: input {shape},"
            f" output {at} is {float(output[at]):.6g} instead of {float(expected[at]):.6g}"
            f" (relative error {agreement.relative_error:.1e}, allowed {tolerance:.0e};"
            f" same top-1 for {agreement.top1_agreement:.0%}); no file was written"
        )
    return Check(shape, agreement)


def run(model: nn.Module, images: Tensor) -> Any:
    """Run the model without gradients."""
    with torch.no_grad():
        return model(images)


def random_images(shape: Sequence[int]) -> Tensor:
    """Return normalized-image-like values, the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
