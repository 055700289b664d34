"""Smaller forms of a LiteRT file: weights in fp16, or int8 where the time goes."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from backbones.engines.formats import Conversion
from backbones.engines.quantization import Layer, Plan, layers_of, outputs_of
from backbones.optional import optional_import

__all__ = ["Int8", "in_half"]

# Norms, activations and pooled statistics stay in float32: int8 is slower there or less accurate.
QUANTIZED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")
WITH_WEIGHTS = QUANTIZED[:3]


def in_half(content: bytes) -> bytes:
    """Return a file with the weights of convolutions and linear layers in fp16."""
    types = optional_import("ai_edge_quantizer.qtyping", "litert")
    quantizer = _quantizer(content)
    half = types.OpQuantizationConfig(
        weight_tensor_config=types.TensorQuantizationConfig(
            num_bits=16, dtype=types.TensorDataType.FLOAT
        ),
        compute_precision=types.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    for name in WITH_WEIGHTS:
        quantizer.update_quantization_recipe(
            regex=".*",
            operation_name=types.TFLOperationName(name),
            op_config=half,
            algorithm_key="float_casting",
        )
    return _result(quantizer, None)


class Int8:
    """Makes int8 forms of a file: weights a channel, activations a tensor, ranges from images.

    `program` is the model as it was recorded. Names in the file tell the module of an operation,
    so that all layers of a module stay in float32 together.
    """

    def __init__(
        self, content: bytes, conversion: Conversion, program: GraphModule, channels_last: bool
    ) -> None:
        self.content, self.conversion = content, conversion
        self.channels_last = channels_last
        self.scopes = {name: _scope_of(layer) for name, layer in layers_of(program).items()}
        for i, name in enumerate(outputs_of(program)):
            if name in self.scopes:
                self.scopes[name] = f"output_{i}"
        self.types = optional_import("ai_edge_quantizer.qtyping", "litert")

    def quantized(self, plan: Plan) -> bytes:
        """Return the int8 form of a plan, with the ranges of its images."""
        quantizer, recipe = _quantizer(self.content), self._recipe(plan)
        quantizer.load_quantization_recipe(recipe.get_quantization_recipe())
        return _result(quantizer, self._ranges(recipe, plan.images))

    def _recipe(self, plan: Plan) -> Any:
        recipes = optional_import("ai_edge_quantizer.recipe_manager", "litert")
        recipe, kinds = recipes.RecipeManager(), self.types.TFLOperationName
        for name in QUANTIZED:
            recipe.add_static_config(
                regex=".*", operation_name=kinds(name), activation_num_bits=8, weight_num_bits=8
            )
        nothing = recipes.AlgorithmName.NO_QUANTIZE
        for scope in sorted({self.scopes[name] for name in plan.kept}):
            for kind in QUANTIZED:
                recipe.add_quantization_config(scope, kinds(kind), algorithm_key=nothing)
        return recipe

    def _ranges(self, recipe: Any, images: Tensor) -> Any:
        """Return the least and the largest value of each tensor over all images.

        The quantizer's own default is a moving average, in which single images count little and
        the order of all of them counts.
        """
        tools = optional_import("ai_edge_quantizer.calibrator", "litert")
        update = optional_import("ai_edge_quantizer.utils.qsv_utils", "litert").min_max_update
        runtime = optional_import("ai_edge_litert.interpreter", "litert")
        runner = runtime.Interpreter(model_content=self.content)
        ((signature, ends),) = runner.get_signature_list().items()
        order = (0, 2, 3, 1) if self.channels_last else (0, 1, 2, 3)
        batches = [
            {ends["inputs"][0]: batch.permute(order).contiguous().numpy()}
            for batch in self.conversion.calibration_batches(images)
        ]
        with _quiet():
            calibrator = tools.Calibrator(
                bytearray(self.content), num_threads=1, qsv_update_func=update
            )
            calibrator.calibrate({signature: batches}, recipe)
            return calibrator.get_model_qsvs()


def _scope_of(layer: Layer) -> str:
    """Return an expression for the names of what a layer's module computes in a file."""
    parts = [f"{kind}_{path.split('.')[-1]}" for path, kind in layer.modules if path]
    return re.escape("/".join(parts) + ";")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars off the terminal, and that all tensors are kept in memory, as need be."""
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _quantizer(content: bytes) -> Any:
    return optional_import("ai_edge_quantizer.quantizer", "litert").Quantizer(bytearray(content))


def _result(quantizer: Any, ranges: Any) -> bytes:
    """Return the file that the quantizer makes."""
    with _quiet():
        made = quantizer.quantize(ranges, enable_progress_report=False)
    return bytes(made.quantized_model)
