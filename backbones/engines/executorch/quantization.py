"""int8 by XNNPACK's own quantizer: weights a channel, activations a tensor, ranges from images."""

from typing import Any

import torch
from torch import nn

from backbones.engines.executorch.forms import ChannelMean
from backbones.engines.formats import Conversion
from backbones.optional import optional_import

__all__ = ["quantized"]

LEAST_SCALE = 2.0**-24  # below any that weights or activations of a model have


def quantized(program: Any, conversion: Conversion) -> nn.Module:
    """Return the int8 form of what ``torch.export`` recorded, calibrated on the images.

    Convolutions and linear layers are quantized; norms, activations and products of feature maps
    stay in float32.
    """
    pt2e = optional_import("torchao.quantization.pt2e.quantize_pt2e", "executorch")
    # What the images of calibration number is no business of the bounds of the file.
    model = pt2e.prepare_pt2e(program.module(check_guards=False), _quantizer())
    assert conversion.calibration is not None  # `export` refuses int8 without images
    with torch.no_grad():
        for batch in conversion.calibration_batches(conversion.calibration):
            model(batch)
    result: nn.Module = pt2e.convert_pt2e(model)
    return result


def _quantizer() -> Any:
    """Return XNNPACK's quantizer for convolutions and linear layers."""
    xnnpack = optional_import(
        "executorch.backends.xnnpack.quantizer.xnnpack_quantizer", "executorch"
    )
    quantizer, aten = xnnpack.XNNPACKQuantizer(), torch.ops.aten
    for operator in (aten.conv2d.default, aten.linear.default):
        quantizer.set_operator_type(operator, _ranges())
    # The mean and variance of a norm decide over whole maps, and have to be exact.
    quantizer.set_filter_function(lambda node: not _within(node, ChannelMean))
    return quantizer


def _within(node: Any, kind: type[nn.Module]) -> bool:
    """Tell whether a node of a program was recorded in a module of this type."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return any(found == name for _, found in node.meta.get("nn_module_stack", {}).values())


def _ranges() -> Any:
    """Return how ranges are found: the least and largest values, of weights for each channel.

    XNNPACK's own configuration has no scales below 2**-12, and merged weights have some.
    """
    pt2e = optional_import("torchao.quantization.pt2e", "executorch")
    spec = optional_import("torchao.quantization.pt2e.quantizer", "executorch")
    activations = spec.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=pt2e.MinMaxObserver.with_args(eps=LEAST_SCALE),
    )
    weights = spec.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=pt2e.PerChannelMinMaxObserver.with_args(eps=LEAST_SCALE),
    )
    return spec.QuantizationConfig(activations, activations, weights, None, is_qat=False)
