"""Smaller forms of a LiteRT file: weights in fp16, or int8 where the time goes."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import numpy as np

from backbones.engines.formats import Conversion
from backbones.optional import optional_import

__all__ = ["in_half", "in_int8"]

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


def in_int8(content: bytes, conversion: Conversion, channels_last: bool) -> bytes:
    """Return a file in int8, weights a channel, activations a tensor, ranges from the images."""
    types = optional_import("ai_edge_quantizer.qtyping", "litert")
    recipes = optional_import("ai_edge_quantizer.recipe_manager", "litert")
    quantizer, recipe = _quantizer(content), recipes.RecipeManager()
    for name in QUANTIZED:
        recipe.add_static_config(
            regex=".*",
            operation_name=types.TFLOperationName(name),
            activation_num_bits=8,
            weight_num_bits=8,
        )
    quantizer.load_quantization_recipe(recipe.get_quantization_recipe())
    runner = optional_import("ai_edge_litert.interpreter", "litert").Interpreter(
        model_content=content
    )
    ((signature, ends),) = runner.get_signature_list().items()
    images = [*_as_the_file_takes(conversion, ends["inputs"][0], channels_last)]
    return _result(quantizer, _ranges(content, recipe, {signature: images}))


def _ranges(content: bytes, recipe: Any, images: Any) -> Any:
    """Return the least and the largest value of each tensor over all images.

    The quantizer's own default is a moving average, in which single images count little and the
    order of all of them counts.
    """
    tools = optional_import("ai_edge_quantizer.calibrator", "litert")
    update = optional_import("ai_edge_quantizer.utils.qsv_utils", "litert").min_max_update
    with _quiet():
        calibrator = tools.Calibrator(bytearray(content), num_threads=1, qsv_update_func=update)
        calibrator.calibrate(images, recipe)
        return calibrator.get_model_qsvs()


def _as_the_file_takes(
    conversion: Conversion, name: str, channels_last: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Yield calibration images by the input's name."""
    for batch in conversion.calibration_batches():
        one = batch.transpose(0, 2, 3, 1) if channels_last else batch
        yield {name: np.ascontiguousarray(one)}


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
