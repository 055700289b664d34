"""export(): convert, run the file in its engine, compare, and only then put it in place."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

# The imports register the formats.
import backbones.engines.executorch
import backbones.engines.onnx
import backbones.engines.openvino
import backbones.engines.pytorch  # noqa: F401
from backbones.engines.formats import Conversion, Format, FormatConfig, find_format
from backbones.engines.images import Images, load_images
from backbones.engines.metadata import describe, input_size_of
from backbones.engines.placement import put_in_place
from backbones.engines.preparation import DTYPES, merged, prepared, unmerged
from backbones.engines.verification import Agreement, compare, outputs_of
from backbones.errors import ConfigError, ExportError, UnsupportedError
from backbones.reparam import backbones_in

__all__ = ["ExportReport", "export", "random_input", "run"]

DYNAMIC = ("batch", "height", "width")
# Largest difference over the output's largest magnitude. Half precision keeps three digits
# (fp16) or two (bf16) of every step. What 256 levels cost depends on the weights, and they hold for
# images like those of calibration only: int8 is compared on these, and its report tells how far it
# is; only what has lost the model altogether is refused.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1, "int8": 1.0}
PART = 32  # images that are compared at a time


@dataclass(frozen=True)
class _Check:
    """One comparison of the exported file with the model.

    `shape` is the input's; `real` tells whether it held the user's images instead of random ones.
    """

    shape: tuple[int, ...]
    agreement: Agreement
    real: bool = False


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how well it agrees with the model in float32."""

    path: Path
    format: str
    precision: str
    input_size: tuple[int, ...]
    dynamic: tuple[str, ...]
    bytes: int
    seconds: float
    engine: str | None
    checks: tuple[_Check, ...]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the format tells besides, such as ExecuTorch's share of delegated operations."""

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
    merge: bool = True,
    preprocess: bool = False,
    features: bool = False,
    calibration: Images | None = None,
    classes: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write `model` in a deployment format, proved equal to the model.

    What leaves is a copy in eval mode on the CPU, re-parameterized. The file is run in its engine
    and compared with the model on random images, for two batch sizes and, where height and width
    are free, two sizes; and on `calibration`, if given. It appears at `path` only if it agrees.
    The model itself stays as it is.

    Args:
        model: images (B, C, H, W) to logits (B, classes) or to a list of maps.
        path: where the file goes; its folder must exist, an old file is replaced. OpenVINO's
            weights, and ONNX weights beyond 2 GB, go to a second file beside it.
        format: a format's name or config; None for that of the path's suffix.
        input_size: ([channels,] height, width); None for the model's own.
        dynamic: which dimensions stay free: of ``batch``, ``height`` and ``width``.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``, as far as the format has it.
        verify: False leaves the comparison out.
        merge: False leaves the model as it is, un-merged.
        preprocess: the file takes decoded images, uint8 (B, H, W, C), and resizes, crops and
            normalizes them itself: images of any size, or of `input_size` where the format cannot
            leave sizes free.
        features: the file gives the maps of all stages instead of logits.
        calibration: for int8, and for agreement figures on real images: a folder of images, or a
            batch (N, C, H, W) that is normalized.
        classes: names of the classes, written into the file.
        provenance: where the weights come from, written into the file.

    Raises:
        UnsupportedError: a format, precision or kind of model that cannot be exported.
        ConfigError: an unknown dynamic dimension, an impossible input size, the path's folder does
            not exist, or int8 without images.
        MissingDependencyError: an optional package is needed.
        EquivalenceError: the model cannot be merged exactly.
        ExportError: the conversion failed, or the file does not compute what the model computes;
            no file is left, and one that was there before is untouched.
    """
    start, path = time.perf_counter(), Path(path)
    target, config = find_format(format, path)
    if preprocess:
        dynamic = [name for name in DYNAMIC if name in dynamic or name in DYNAMIC[1:]]
        dynamic = [name for name in dynamic if name in target.dynamic]
    _check_request(target, dynamic, precision, path)
    if precision == "int8" and calibration is None:
        raise ConfigError(
            f"{path}: int8 needs images to calibrate on; pass calibration=FOLDER or a tensor"
        )
    size = input_size_of(model, input_size)
    data_config = {**resolve_model_data_config(model), "input_size": size}
    real = None if calibration is None else load_images(calibration, data_config)
    if preprocess and real is not None:
        raise UnsupportedError("calibration images are normalized; leave preprocess out")
    clone = merged(model) if merge else unmerged(model)
    _check_sizes(clone, [] if preprocess else dynamic)
    wrap = {"preprocess": preprocess, "features": features}
    half = precision in DTYPES  # which changes the very model
    reference = prepared(
        copy.deepcopy(clone) if half else clone, data_config, precision="fp32", **wrap
    )
    example = random_input((2 if "batch" in dynamic else 1, *size), raw=preprocess)
    outputs = _names_of(run(reference, example))
    conversion = Conversion(
        model=prepared(clone, data_config, precision=precision, **wrap) if half else reference,
        example=example,
        dynamic=tuple(dynamic),
        raw=preprocess,
        outputs=outputs,
        precision=precision,
        calibration=real,
        metadata={
            **describe(model, size, classes, provenance),
            "precision": precision,
            "preprocess": preprocess,
            "outputs": outputs,
            "dynamic": list(dynamic),
        },
    )
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        file = Path(folder) / path.name
        notes = target.convert(conversion, config, file)
        # The runner is gone before the file moves: some systems do not move a file that is open.
        engine, checks = (
            _verified(reference, target, file, conversion, path) if verify else (None, ())
        )
        written = put_in_place(file, path)
    return ExportReport(
        path=path,
        format=target.name,
        precision=precision,
        input_size=size,
        dynamic=tuple(dynamic),
        bytes=written,
        seconds=time.perf_counter() - start,
        engine=engine,
        checks=checks,
        notes=notes or {},
    )


def _verified(
    reference: nn.Module, target: Format, file: Path, conversion: Conversion, path: Path
) -> tuple[str, tuple[_Check, ...]]:
    """Run a file in its engine and compare it with the model.

    Returns:
        The engine's name, and the comparisons.

    Raises:
        ExportError: the file cannot be opened, or does not compute what the model computes.
    """
    runner = target.open(file)
    inputs: list[tuple[Tensor, bool]] = []
    if conversion.precision != "int8":
        random = [random_input(shape, raw=conversion.raw) for shape in _shapes(conversion)]
        inputs += [(x, False) for x in random]
    if conversion.calibration is not None:
        real = conversion.calibration
        inputs.append((real if "batch" in conversion.dynamic else real[:1], True))
    tolerance = TOLERANCE[conversion.precision]
    return runner.engine, tuple(
        _Check(tuple(x.shape), _check(reference, runner, x, tolerance, path), real)
        for x, real in inputs
    )


def _check_request(target: Format, dynamic: Sequence[str], precision: str, path: Path) -> None:
    """Refuse what the format cannot do before anything is computed.

    Raises:
        UnsupportedError: a precision or free dimension that the format does not have.
        ConfigError: no such precision or dimension, or no folder to write to.
    """
    if precision not in TOLERANCE:
        raise ConfigError(f"no precision {precision!r}; there are {', '.join(TOLERANCE)}")
    if precision not in target.precisions:
        raise UnsupportedError(
            f"format {target.name!r} has no precision {precision!r}; it has"
            f" {', '.join(target.precisions)}"
        )
    for name in dynamic:
        if name not in DYNAMIC:
            raise ConfigError(f"no dynamic dimension {name!r}; there are {', '.join(DYNAMIC)}")
        if name not in target.dynamic:
            raise UnsupportedError(
                f"format {target.name!r} plans memory for one image size: {name!r} cannot stay"
                f" free; give input_size, one file a size"
            )
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{path}: give a file in a folder that exists")


def _check_sizes(model: nn.Module, dynamic: Sequence[str]) -> None:
    """Refuse a free image size where the graph would be wrong for other sizes than its own.

    Raises:
        UnsupportedError: the model's graph depends on the size.
    """
    for _, part in backbones_in(model):
        if part.fixed_size_reason and {"height", "width"} & set(dynamic):
            raise UnsupportedError(
                f"{type(part).__name__}: height and width cannot stay free,"
                f" {part.fixed_size_reason}; leave them out of dynamic and export one file a size"
            )


def _names_of(result: Any) -> tuple[str, ...]:
    """Return names for a model's outputs.

    Raises:
        UnsupportedError: it gives neither a tensor nor a list of them.
    """
    if isinstance(result, Tensor):
        return ("logits",)
    if not isinstance(result, list | tuple) or not all(isinstance(x, Tensor) for x in result):
        raise UnsupportedError("only models that return a tensor or a list of them can be exported")
    return tuple(f"features_{i}" for i in range(len(result)))


def _shapes(conversion: Conversion) -> list[tuple[int, ...]]:
    """Return input shapes (B, C, H, W) that differ from the example's in every free dimension."""
    channels, height, width = conversion.metadata["input"]["input_size"]
    free = conversion.dynamic
    other_height = height + 32 if "height" in free else height
    other_width = width + 64 if "width" in free else width
    found: list[tuple[int, ...]] = [(1, channels, height, width)]
    if "batch" in free:
        found.append((5, channels, height, width))
    if (other_height, other_width) != (height, width):
        found.append((1, channels, other_height, other_width))
    return found


def _check(
    model: nn.Module,
    runner: Callable[[Tensor], Any],
    x: Tensor,
    tolerance: float,
    path: Path,
) -> Agreement:
    """Compare runner and model on an input.

    Raises:
        ExportError: they differ by more than `tolerance`, relative to the output's magnitude.
    """
    expected, shape = run(model, x), tuple(x.shape)
    found = runner(x)
    try:
        agreement = compare(expected, found)
    except ExportError as error:
        raise ExportError(f"{path}: input {shape}: {error}; no file was written") from None
    if agreement.relative_error > tolerance:
        at, number = agreement.worst, agreement.output
        is_, should = outputs_of(found)[number][at], outputs_of(expected)[number][at]
        raise ExportError(
            f"{path}: the exported file does not compute what the model computes: input {shape},"
            f" output {at} is {float(is_):.6g} instead of {float(should):.6g}"
            f" (relative error {agreement.relative_error:.1e}, allowed {tolerance:.0e};"
            f" same top-1 for {agreement.top1_agreement:.0%}); no file was written"
        )
    return agreement


def run(model: nn.Module, x: Tensor) -> Any:
    """Run the model without gradients, a few images at a time."""
    with torch.no_grad():
        parts = [model(part) for part in x.split(PART)]
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [torch.cat(outputs) for outputs in zip(*parts)]


def random_input(shape: Sequence[int], *, raw: bool = False) -> Tensor:
    """Return an input for images (B, C, H, W), the same in every call: values like those of
    normalized images, or uint8 (B, H, W, C) if `raw`."""
    generator = torch.Generator().manual_seed(0)
    if not raw:
        return torch.randn(*shape, generator=generator)
    batch, channels, height, width = shape
    return torch.randint(
        0, 256, (batch, height, width, channels), generator=generator, dtype=torch.uint8
    )
