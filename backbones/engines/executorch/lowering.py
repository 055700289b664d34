"""From a model to an ExecuTorch program, what XNNPACK knows delegated to it."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from backbones.engines.executorch.forms import for_xnnpack
from backbones.engines.executorch.passes import simplified, with_constants, with_plain_attention
from backbones.engines.executorch.quantization import is_quantized, quantized
from backbones.engines.executorch.runner import ExecuTorchRunner
from backbones.engines.executorch.sizes import Span, free_sizes, known_dims
from backbones.engines.formats import Conversion, FormatConfig, Notes, traced
from backbones.engines.preparation import contiguous_copy
from backbones.engines.quantization import OPERATORS, Plan, to_target
from backbones.engines.runners import explained
from backbones.errors import ConfigError, ExportError
from backbones.optional import optional_import

__all__ = ["ExecuTorchConfig", "to_executorch"]


@dataclass(frozen=True)
class ExecuTorchConfig(FormatConfig):
    """ExecuTorch, which plans memory for the largest input.

    Args:
        max_batch: images of a batch at most, where their number is free.
        max_size: largest height and width, where they are free; None for twice `input_size`.
        images: lower the program for this number of images, of which XNNPACK runs more, even where
            their number is free: our runner cuts and fills other numbers. None for a program that
            takes any number up to `max_batch`.
    """

    max_batch: int = 8
    max_size: int | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        if self.images is not None and (type(self.images) is not int or self.images < 1):
            raise ConfigError(f"no program for {self.images!r} images; give 1 or more")


def to_executorch(conversion: Conversion, config: ExecuTorchConfig, path: Path) -> Notes:
    """Write the program, what XNNPACK knows delegated to it; metadata is the method ``backbones``.

    In int8 the weights and activations of convolutions and linear layers are quantized.

    Returns how many operations XNNPACK runs, and how many the portable (slow) kernels; and the
    sizes that a free height and width may have.
    """
    spans = free_sizes(conversion, config.max_size)
    exact = config.images if "batch" in conversion.dynamic else None
    most = {"batch": exact or config.max_batch, **{name: span.most for name, span in spans.items()}}
    dims = known_dims(spans, config.max_batch)
    shape = [
        most[conversion.axes[axis]] if axis in conversion.axes else size
        for axis, size in enumerate(conversion.example.shape)
    ]
    facts = {
        **conversion.metadata,
        "shape": shape,
        "free_batch": "batch" in conversion.dynamic,
        "images": exact,
        "free_sizes": {name: dataclasses.asdict(span) for name, span in spans.items()},
    }
    # Where lowering loses the bound of a size, memory is planned for the example's.
    largest = dataclasses.replace(
        conversion,
        model=for_xnnpack(conversion.model),
        example=conversion.example.new_zeros(shape),
        dynamic=(*spans,) if exact else conversion.dynamic,
    )
    with _way_out(spans, path):
        if conversion.precision == "int8":
            notes = _quantized(_contiguous(largest), dims, facts, path)
        else:
            notes = _lowered(_program(_contiguous(largest), dims), facts, path)
    if spans:
        notes["free_sizes"] = {name: str(span) for name, span in spans.items()}
    return notes


def _program(conversion: Conversion, dims: Mapping[str, Any]) -> Any:
    """Return what ``torch.export`` records of a model in float32."""
    return with_constants(with_plain_attention(traced(conversion, dims)))


def _quantized(
    conversion: Conversion, dims: Mapping[str, Any], facts: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Write the program in int8, preprocessing in float32; return notes on it."""
    before, inner = conversion.parts() if conversion.raw else (None, conversion)
    program = _program(inner, dims)
    # Of a program with preprocessing the model alone is tried, on normalized images.
    own = {**facts, "preprocess": False, "shape": list(inner.example.shape)}
    notes: dict[str, Any] = {}
    model: nn.Module = conversion.model

    def make(plan: Plan) -> None:
        nonlocal model
        with explained(f"{path.name}: XNNPACK's quantizer cannot quantize it"):
            model = quantized(program, inner, plan)
        recorded = traced(dataclasses.replace(inner, model=model), dims)
        notes.update(_lowered(recorded, own, path))

    held = to_target(
        inner,
        program.module(check_guards=False),
        make,
        lambda: ExecuTorchRunner(path),
        quantizes=is_quantized,
        rounded=OPERATORS,
        kinds=1,
    )
    if before is not None:
        both = nn.Sequential(before.model, model)
        recorded = traced(dataclasses.replace(conversion, model=both), dims)
        notes.update(_lowered(recorded, facts, path))
    return {**notes, **held}


def _lowered(program: Any, facts: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Lower a recorded program and write it; return what XNNPACK runs of it."""
    exir = optional_import("executorch.exir", "executorch")
    passes = optional_import("executorch.exir.passes.sym_shape_eval_pass", "executorch")
    xnnpack = optional_import(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch"
    )
    with explained(f"{path.name}: ExecuTorch cannot lower it", OSError):
        lowered = exir.to_edge_transform_and_lower(
            program,
            transform_passes=[simplified],
            partitioner=[xnnpack.XnnpackPartitioner()],
            # Its checks ask splits for their length, which makes a constant of a free batch.
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=not facts["free_sizes"]),
            constant_methods={"backbones": json.dumps(facts, allow_nan=False)},
        )
        plan = exir.ExecutorchBackendConfig(
            sym_shape_eval_pass=passes.ConstraintBasedSymShapeEvalPass()
        )
        with path.open("wb") as stream:
            lowered.to_executorch(plan).write_to_file(stream)
        return _delegation(lowered)


@contextmanager
def _way_out(spans: Mapping[str, Span], path: Path) -> Iterator[None]:
    """Tell whose model cannot be recorded or lowered for free sizes what to do instead."""
    try:
        yield
    except ExportError as error:
        if not spans:
            raise
        raise ExportError(
            f"{path.name}: {' and '.join(spans)} cannot stay free: {error}; leave them out of"
            " dynamic and export one file a size"
        ) from error


def _contiguous(conversion: Conversion) -> Conversion:
    """Return the conversion with example and weights contiguous.

    Of tensors that are channels last, or views with other strides, ExecuTorch writes programs that
    compute wrong numbers, or that fail when they are called.
    """
    return dataclasses.replace(
        conversion,
        model=contiguous_copy(conversion.model),
        example=conversion.example.contiguous(),
    )


def _delegation(lowered: Any) -> dict[str, Any]:
    """Count the operations of a lowered program."""
    debug = optional_import("executorch.devtools.backend_debug", "executorch")
    found = debug.get_delegation_info(lowered.exported_program().graph_module)
    delegated, others = found.num_delegated_nodes, found.num_non_delegated_nodes
    return {
        "delegated_operations": delegated,
        "other_operations": others,
        "delegated_share": delegated / (delegated + others),
    }
