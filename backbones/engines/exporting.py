"""export(): convert, run the file in its engine, compare, and only then put it in place."""

import copy
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config
from torch import Tensor, nn

from backbones.engines.formats import Conversion, Format, FormatConfig
from backbones.engines.preparation import (
    HALVES,
    PRECISIONS,
    Images,
    input_size_of,
    load_images,
    load_labels,
    load_raw_images,
    plain_copy,
    prepared,
    random_input,
    reparameterized_copy,
)
from backbones.engines.quantization import equalized
from backbones.engines.runners import Runner
from backbones.engines.targets import find_format
from backbones.engines.verification import Check, run_model, verify_on_inputs
from backbones.errors import ConfigError, UnsupportedError
from backbones.factory import label_names
from backbones.images import fit_channels
from backbones.reparameterization import backbones_in
from backbones.wrappers import unwrapped

__all__ = ["AGREEMENT", "ExportReport", "export"]

DYNAMIC = ("batch", "height", "width")
AGREEMENT = 0.99  # of the top-1 classes


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how well it agrees with the model in float32.

    A file whose engine does not run on this system has no `engine` and no `checks`; its note
    ``not_run`` says what was checked instead.
    """

    path: Path
    format: str
    precision: str
    input_size: tuple[int, ...]
    dynamic: tuple[str, ...]
    bytes: int
    seconds: float
    engine: str | None
    checks: tuple[Check, ...]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the format tells besides, such as ExecuTorch's share of delegated operations."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        size = "x".join(str(n) for n in self.input_size)
        lines = [
            f"wrote {self.path}: {self.format} in {self.precision}, input {size},"
            f" {self.bytes / 1e6:.1f} MB, {self.seconds:.0f} s"
        ]
        for one in self.checks:
            kind = "real images" if one.real else "random images"
            found, shape = one.agreement, "x".join(str(n or "?") for n in one.shape)
            lines.append(
                f"  {self.engine} on {kind} {shape}: largest error"
                f" {found.max_error:.1e}, mean {found.mean_error:.1e}, relative"
                f" {found.relative_error:.1e}, {found.in_words}"
            )
        if "not_run" in self.notes:
            lines.append(f"  not run: {self.notes['not_run']}")
        if "layers_in_float32" in self.notes:
            notes = self.notes
            lines.append(
                f"  class of float32 for {notes['agreement']:.1%} of the images of calibration,"
                f" {notes['expected_agreement']:.1%} expected of others like them;"
                f" {len(notes['layers_in_float32'])} of {notes['layers']} layers stay in float32"
                f" ({notes['work_in_float32']:.0%} of the multiplications)"
            )
        if "delegated_share" in self.notes:
            notes = self.notes
            lines.append(
                f"  XNNPACK runs {notes['delegated_operations']} of"
                f" {notes['delegated_operations'] + notes['other_operations']} operations"
                f" ({notes['delegated_share']:.0%}), portable kernels the rest"
            )
        for name, sizes in self.notes.get("free_sizes", {}).items():
            lines.append(f"  {name} may be any of the {sizes}")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    format: str | FormatConfig | None = None,
    input_size: Sequence[int] | None = None,
    dynamic: Sequence[str] = ("batch",),
    batch_size: int | None = None,
    precision: str | None = None,
    verify: bool = True,
    merge: bool = True,
    preprocess: bool = False,
    features: bool = False,
    calibration: Images | None = None,
    agreement: float = AGREEMENT,
    classes: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write `model` in a deployment format, compared with the model.

    What leaves is a copy in eval mode on the CPU, re-parameterized. The file is run in its engine
    and compared with the model on random images, for two batch sizes and, where height and width
    are free, two sizes; and on `calibration`, if given. Where the engine does not run on this
    system (Core ML), the file is read back instead and the report says that it was not run. It
    appears at `path` only if it agrees. The model itself stays as it is.

    Args:
        model: images (B, C, H, W) to logits (B, classes) or to a list of feature maps; of a wrapper
            (compiled, data parallel, averaged) the model that it holds.
        path: where the file goes; its folder must exist, an old file is replaced. OpenVINO's
            weights, and ONNX weights beyond 2 GB, go to a second file beside it. Of Core ML it is
            a folder that stands for a file, of format ``web`` the page's folder.
        format: a format's name or config; None for that of the path's suffix.
        input_size: ([channels,] height, width); None for the model's own.
        dynamic: which dimensions stay free: of ``batch``, ``height`` and ``width``.
        batch_size: the number of images that the file takes, for compilers that want static shapes
            (TensorRT, RKNN, Hailo, Vitis AI). None leaves it to `dynamic`: free, or else 1.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``, as far as the format has it. None is
            ``fp32``, and ``fp16`` for Core ML.
        verify: False leaves the comparison out.
        merge: False leaves the model as it is, un-merged.
        preprocess: the file takes decoded images, uint8 (B, H, W, C), and resizes, crops and
            normalizes them itself: images of any size, or of `input_size` where the format cannot
            leave sizes free. Format ``web`` always does.
        features: the file gives the feature maps of all stages instead of logits.
        calibration: for int8, and for agreement figures on real images: a folder of images, or a
            batch (N, C, H, W) that is normalized. With `preprocess` the figures are for the images
            as decoded, scaled to `input_size` where the format cannot leave sizes free.
        agreement: the share (0 to 1) of images whose class int8 shall keep. The layers that add
            most to the error stay in float32, as few as it takes; where half of the
            multiplications are not enough, a warning says so. 0 quantizes every layer.
        classes: names of the classes, written into the file.
        provenance: where the weights come from, written into the file.

    Raises:
        UnsupportedError: a format, precision or kind of model that cannot be exported.
        ConfigError: an unknown dynamic dimension, an impossible input size, batch size or
            agreement, the path's folder does not exist, or int8 without images or with fewer than a
            batch.
        MissingDependencyError: an optional package is needed.
        EquivalenceError: the model cannot be merged exactly.
        ExportError: the conversion failed, or the file does not compute what the model computes;
            no file is left, and one that was there before is untouched.
    """
    start, path, model = time.perf_counter(), Path(path), unwrapped(model)
    target, config = find_format(format, path)
    preprocess = preprocess or target.page
    precision = target.precisions[0] if precision is None else precision
    if batch_size is not None:
        dynamic = tuple(name for name in dynamic if name != "batch")
    free = _free_dimensions(target, dynamic, preprocess)
    _check_request(target, free, precision, path)
    if calibration is None and precision == "int8":
        raise ConfigError(
            f"{path}: int8 needs images to calibrate on; pass calibration=FOLDER or a tensor"
        )
    if not 0 <= agreement <= 1:
        raise ConfigError(f"agreement is a share of images, 0 to 1, got {agreement!r}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(f"no batch of {batch_size!r} images; give 1 or more")
    size = input_size_of(model, input_size)
    data_config = fit_channels({**resolve_model_data_config(model), "input_size": size}, size[0])
    real = None if calibration is None else load_images(calibration, data_config)
    if batch_size is not None and real is not None and len(real) < batch_size:
        raise ConfigError(
            f"the file shall take {batch_size} images at once, and calibration has {len(real)};"
            " give more images or a smaller batch_size"
        )
    clone = reparameterized_copy(model) if merge else plain_copy(model)
    _check_free_sizes(clone, () if preprocess else free)
    wrap = {"preprocess": preprocess, "features": features}
    half = precision in HALVES and target.computes_half  # which changes the very model
    reference = prepared(
        copy.deepcopy(clone) if half else clone, data_config, precision="fp32", **wrap
    )
    images = 2 if "batch" in free else batch_size or 1
    example = random_input((images, *size), raw=preprocess)
    outputs = _output_names(run_model(reference, example))
    conversion = Conversion(
        model=prepared(clone, data_config, precision=precision, **wrap) if half else reference,
        example=example,
        dynamic=free,
        raw=preprocess,
        outputs=outputs,
        precision=precision,
        calibration=real,
        agreement=agreement,
        metadata={
            **_description(model, provenance),
            "classes": None if classes is None else list(classes),
            "input": {**data_config, "input_size": list(size)},
            "precision": precision,
            "preprocess": preprocess,
            "outputs": outputs,
            "dynamic": list(free),
        },
    )
    if precision == "int8":
        conversion = equalized(conversion)
    with target.place(path) as file:
        notes = dict(target.convert(conversion, config, file) or {})
        engine: str | None = None
        checks: tuple[Check, ...] = ()
        if verify and target.read_back is not None:
            notes.update(target.read_back(file, conversion))
        elif verify:
            # The runner is gone before the file moves: some systems do not move open files.
            own = _own_images(calibration, conversion)
            labels = _own_labels(calibration, conversion, classes or label_names(model))
            engine, checks = _verified(reference, target, file, conversion, path, own, labels)
        beside = file if target.folder else file.parent
        written = sum(one.stat().st_size for one in beside.rglob("*") if one.is_file())
    return ExportReport(
        path=path,
        format=target.name,
        precision=precision,
        input_size=size,
        dynamic=free,
        bytes=written,
        seconds=time.perf_counter() - start,
        engine=engine,
        checks=checks,
        notes=notes,
    )


def _free_dimensions(target: Format, dynamic: Sequence[str], preprocess: bool) -> tuple[str, ...]:
    """Return the dimensions that stay free; a file that resizes takes images of any size."""
    if not preprocess:
        return tuple(dynamic)
    asked = [name for name in DYNAMIC if name in dynamic or name in DYNAMIC[1:]]
    known = target.dynamic if target.dynamic_raw is None else target.dynamic_raw
    return tuple(name for name in asked if name in known)


def _check_request(target: Format, dynamic: Sequence[str], precision: str, path: Path) -> None:
    """Refuse what the format cannot do before anything is computed."""
    if precision not in PRECISIONS:
        raise ConfigError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
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
    if not path.parent.is_dir() or (path.exists() and path.is_dir() != target.folder):
        kind = "folder" if target.folder else "file"
        raise ConfigError(f"{path}: give a {kind} in a folder that exists")


def _check_free_sizes(model: nn.Module, dynamic: Sequence[str]) -> None:
    """Refuse a free image size where the graph would be wrong for other sizes than its own."""
    for _, part in backbones_in(model):
        if part.fixed_size_reason and {"height", "width"} & set(dynamic):
            raise UnsupportedError(
                f"{type(part).__name__}: height and width cannot stay free,"
                f" {part.fixed_size_reason}; leave them out of dynamic and export one file a size"
            )


def _output_names(result: Any) -> tuple[str, ...]:
    """Return names for a model's outputs."""
    if isinstance(result, Tensor):
        return ("logits",)
    if not isinstance(result, list | tuple) or not all(isinstance(x, Tensor) for x in result):
        raise UnsupportedError("only models that return a tensor or a list of them can be exported")
    return tuple(f"features_{i}" for i in range(len(result)))


def _description(model: nn.Module, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return name, arguments, license and provenance as JSON values."""
    config: Mapping[str, Any] = getattr(model, "config", None) or {}
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    source = {key: cfg[key] for key in ("hf_hub_id", "url", "tag") if cfg.get(key)}
    return {
        "name": config.get("name") or cfg.get("architecture"),
        "arguments": config.get("arguments"),
        "license": cfg.get("license"),
        "provenance": dict(provenance) if provenance is not None else source or None,
    }


def _own_images(calibration: Images | None, conversion: Conversion) -> Iterable[Tensor]:
    """Give the user's images, in batches that the file takes."""
    if calibration is None or conversion.calibration is None:
        return
    given: Iterable[Tensor] = [conversion.calibration]
    if conversion.raw:
        free = "height" in conversion.dynamic
        size = None if free else conversion.example.shape[1:3]
        given = load_raw_images(calibration, conversion.metadata["input"], size)
    for x in given:
        if "batch" in conversion.dynamic:
            yield x
        else:  # as many as it takes; one photograph, if need be, several times
            images = len(conversion.example)
            yield x.expand(images, *x.shape[1:]) if len(x) == 1 else x[:images]


def _own_labels(
    calibration: Images | None, conversion: Conversion, classes: Sequence[str] | None
) -> Tensor | None:
    """Return the classes of what `_own_images` gives, where folders tell them."""
    labels = None if calibration is None else load_labels(calibration, classes)
    if labels is None or "batch" in conversion.dynamic:
        return labels
    images = len(conversion.example)
    return labels.repeat_interleave(images) if conversion.raw else labels[:images]


def _verified(
    reference: nn.Module,
    target: Format,
    file: Path,
    conversion: Conversion,
    path: Path,
    own: Iterable[Tensor],
    labels: Tensor | None,
) -> tuple[str, tuple[Check, ...]]:
    """Run a file in its engine and compare it; return the engine's name and the comparisons."""
    runner = target.open(file)
    shapes = _shapes(conversion, runner) if conversion.precision != "int8" else []
    compared = reference, runner
    checks = [
        verify_on_inputs(
            *compared, [random_input(shape, raw=conversion.raw)], conversion.precision, path
        )
        for shape in shapes
    ]
    if conversion.calibration is not None:
        real = verify_on_inputs(
            *compared, own, conversion.precision, path, real=True, labels=labels
        )
        checks.append(real)
    return runner.engine, tuple(checks)


def _shapes(conversion: Conversion, runner: Runner) -> list[tuple[int, ...]]:
    """Return input shapes (B, C, H, W) that differ from the example's in every free dimension."""
    channels, height, width = conversion.metadata["input"]["input_size"]
    free = conversion.dynamic
    images = 1 if "batch" in free else len(conversion.example)
    found: list[tuple[int, ...]] = [(images, channels, height, width)]
    if "batch" in free:
        found.append((5, channels, height, width))
    if {"height", "width"} & {*free}:
        found += [
            (images, channels, h if "height" in free else height, w if "width" in free else width)
            for h, w in runner.other_sizes(height, width)
        ]
    return found
