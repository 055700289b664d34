"""From a model to an ExecuTorch program, what XNNPACK knows delegated to it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from backbones.engines.executorch.forms import for_xnnpack
from backbones.engines.executorch.passes import simplified, with_constants, with_plain_attention
from backbones.engines.executorch.quantization import quantized
from backbones.engines.formats import Conversion, FormatConfig, Notes, traced
from backbones.engines.preparation import contiguous_copy
from backbones.engines.runners import explained
from backbones.optional import optional_import

__all__ = ["ExecuTorchConfig", "to_executorch"]


@dataclass(frozen=True)
class ExecuTorchConfig(FormatConfig):
    """ExecuTorch; memory is planned for batches of up to `max_batch` images."""

    max_batch: int = 8


def to_executorch(conversion: Conversion, config: ExecuTorchConfig, path: Path) -> Notes:
    """Write the program, what XNNPACK knows delegated to it; metadata is the method ``backbones``.

    In int8 the weights and activations of convolutions and linear layers are quantized.

    Returns how many operations XNNPACK runs, and how many the portable (slow) kernels.
    """
    exir = optional_import("executorch.exir", "executorch")
    passes = optional_import("executorch.exir.passes.sym_shape_eval_pass", "executorch")
    xnnpack = optional_import(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch"
    )
    free = "batch" in conversion.dynamic
    batch = config.max_batch if free else conversion.example.shape[0]
    shape = [batch, *conversion.example.shape[1:]]
    facts = {**conversion.metadata, "shape": shape, "free_batch": free}
    # Where lowering loses the bound of a size, memory is planned for the example's.
    program = _program(
        dataclasses.replace(conversion, example=conversion.example[:1].expand(*shape)), config, path
    )
    with explained(f"{path.name}: ExecuTorch cannot lower it", OSError):
        lowered = exir.to_edge_transform_and_lower(
            program,
            transform_passes=[simplified],
            partitioner=[xnnpack.XnnpackPartitioner()],
            constant_methods={"backbones": json.dumps(facts, allow_nan=False)},
        )
        notes = _delegation(lowered)
        plan = exir.ExecutorchBackendConfig(
            sym_shape_eval_pass=passes.ConstraintBasedSymShapeEvalPass()
        )
        with path.open("wb") as stream:
            lowered.to_executorch(plan).write_to_file(stream)
    return notes


def _program(conversion: Conversion, config: ExecuTorchConfig, path: Path) -> Any:
    """Return what ``torch.export`` records, quantized in int8."""
    limits = {"batch": config.max_batch}
    plain = _contiguous(dataclasses.replace(conversion, model=for_xnnpack(conversion.model)))
    int8 = conversion.precision == "int8"
    before, inner = plain.parts() if int8 and conversion.raw else (None, plain)
    program = with_constants(with_plain_attention(traced(inner, limits)))
    if not int8:
        return program
    with explained(f"{path.name}: XNNPACK's quantizer cannot quantize it"):
        model = quantized(program, inner)
    if before is not None:
        model = nn.Sequential(before.model, model)
    return traced(dataclasses.replace(plain, model=model), limits)


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


def _delegation(lowered: Any) -> Notes:
    """Count the operations of a lowered program."""
    debug = optional_import("executorch.devtools.backend_debug", "executorch")
    found = debug.get_delegation_info(lowered.exported_program().graph_module)
    delegated, others = found.num_delegated_nodes, found.num_non_delegated_nodes
    return {
        "delegated_operations": delegated,
        "other_operations": others,
        "delegated_share": delegated / (delegated + others),
    }
