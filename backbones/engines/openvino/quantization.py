"""int8 by NNCF: where it goes, and the ranges that it gets from this package."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.fx import GraphModule

from backbones.engines.formats import Conversion
from backbones.engines.quantization import Plan, Range, layers_of, outputs_of
from backbones.optional import optional_import, quiet_nncf

__all__ = ["Quantizer"]

LAYERS = ("Convolution", "GroupConvolution", "MatMul")
# Rounded values may pass through what only moves or chooses them. Whatever else computes stays in
# float32: norms, gates, pooled statistics, sums.
MOVES = (
    "Reshape Transpose Squeeze Unsqueeze Concat Split VariadicSplit Slice StridedSlice Gather Pad"
    " Relu MaxPool Broadcast Tile ShuffleChannels DepthToSpace SpaceToDepth"
).split()


class Quantizer:
    """Makes int8 forms of an OpenVINO model, whose weights it folds; `program` as recorded."""

    def __init__(self, model: Any, conversion: Conversion, program: GraphModule) -> None:
        _fold_weights(model)
        self.model = model
        self.conversion = conversion
        self.layers = layers_of(program)
        self.recorded = {node.name: node.name for node in program.graph.nodes}
        for output, name in zip(model.outputs, outputs_of(program)):
            self.recorded |= dict.fromkeys(output.get_names(), name)
        self.layer_of = dict(self._layers())  # by the name of the operation

    def quantized(self, plan: Plan) -> Any:
        """Return the int8 form of a plan; the model stays as it is."""
        present = {operation.get_type_name() for operation in self.model.get_ops()}
        exact = sorted(present.difference(LAYERS, MOVES))
        quantized = {name for name, layer in self.layer_of.items() if layer not in plan.kept}
        kept = [
            operation.get_friendly_name()
            for operation in self.model.get_ops()
            if (
                operation.get_type_name() in LAYERS
                and operation.get_friendly_name() not in quantized
            )
            or _joins_other_axes(operation)
        ]
        batches = [one.numpy() for one in self.conversion.calibration_batches(plan.images)]
        with quiet_nncf() as nncf:
            model = nncf.quantize(
                self.model.clone(),
                nncf.Dataset(batches),
                subset_size=len(batches),
                preset=nncf.QuantizationPreset.MIXED,
                ignored_scope=nncf.IgnoredScope(types=exact, names=kept, validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    disable_bias_correction=_weighs_from_the_left(self.model)
                ),
            )
        for roundings, values in self._rounded_together(model):
            ends = [plan.ranges[name] for name in values]
            for operation in roundings:
                _set_range(operation, (min(e[0] for e in ends), max(e[1] for e in ends)))
        return model

    def _rounded_together(self, model: Any) -> Iterator[tuple[list[Any], set[str]]]:
        """Yield the roundings that make the values that layers read, and the names of these values.

        NNCF rounds channels before they are joined. Parts with ranges of their own are not what the
        search has seen, and OpenVINO then computes some of their readers in float32.
        """
        found: list[tuple[list[Any], set[str]]] = []
        for operation in model.get_ops():
            if operation.get_type_name() != "FakeQuantize":
                continue
            roundings, values = [operation], set(self._read(operation.output(0)))
            for one in [one for one in found if one[1] & values]:
                found.remove(one)
                roundings, values = [*roundings, *one[0]], values | one[1]
            if values:
                found.append((roundings, values))
        yield from found

    def _read(self, output: Any) -> Iterator[str]:
        """Yield the recorded names of the values that layers read and that a value becomes."""
        for reader in output.get_target_inputs():
            node = reader.get_node()
            if node.get_type_name() in MOVES:
                for moved in node.outputs():
                    yield from self._read(moved)
            elif name := self.layer_of.get(node.get_friendly_name()):
                value = self.layers[name].activations.get(reader.get_index())
                yield from () if value is None else (value,)

    def _layers(self) -> Iterator[tuple[str, str]]:
        """Yield the names of operations that int8 is about, and of their recorded layers."""
        for operation in self.model.get_ops():
            if operation.get_type_name() in LAYERS:
                name = self._layer_at(operation.output(0))
                if name in self.layers:
                    yield operation.get_friendly_name(), name

    def _layer_at(self, output: Any) -> str | None:
        """Return the name of the layer that a value is the result of, but for scale and bias."""
        if names := output.get_names() & self.recorded.keys():
            return self.recorded[names.pop()]
        for reader in output.get_target_inputs():
            node = reader.get_node()
            if node.get_type_name() in ("Multiply", "Add"):
                return self._layer_at(node.output(0))
        return None


def _weighs_from_the_left(model: Any) -> bool:
    """Whether some product has its weight before what it weighs, as tokens of a query have.

    NNCF 3.4 corrects the bias after it along the wrong axis: by another shape, which is an error,
    or by other numbers.
    """
    return any(
        operation.get_type_name() == "MatMul"
        and operation.input_value(0).get_node().get_type_name() == "Constant"
        for operation in model.get_ops()
    )


def _joins_other_axes(operation: Any) -> bool:
    """Whether an operation joins something else than the channels of maps (B, C, H, W).

    OpenVINO 2026.4 computes wrong numbers where such parts are rounded before they are joined.
    """
    if operation.get_type_name() != "Concat":
        return False
    rank = len(operation.get_output_partial_shape(0))
    return rank != 4 or operation.get_attributes()["axis"] % rank != 1


def _fold_weights(model: Any) -> None:
    """Make weights constants in the shape in which convolutions read them.

    From ONNX come grouped ones as (O, I / groups, H, W) with a reshape, of which NNCF takes a scale
    for each column of the kernels instead of each output channel, and OpenVINO then computes the
    layer in float32.
    """
    passes = optional_import("openvino.passes", "openvino")
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)


def _set_range(operation: Any, ends: Range) -> None:
    """Give a rounding of activations another range; zero stays one of its values."""
    ov = optional_import("openvino", "openvino")
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    steps = operation.get_attributes()["levels"] - 1
    scale = max((high - low) / steps, 1e-12)
    below = round(-low / scale)
    # NNCF has an end for each channel of what depthwise convolutions read; of one number OpenVINO
    # computes the layer in int8 behind a permutation too.
    for i, end in enumerate((-below * scale, (steps - below) * scale) * 2, start=1):
        operation.input(i).replace_source_output(ov.opset8.constant(np.float32(end)).output(0))
