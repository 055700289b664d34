"""int8 by XNNPACK's own quantizer: weights a channel, activations a tensor, ranges from images."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from backbones.engines.executorch.forms import ChannelMean
from backbones.engines.formats import Conversion
from backbones.engines.quantization import Layer, Plan, layers_of
from backbones.optional import optional_import

__all__ = ["is_quantized", "quantized"]

LEAST_SCALE = 2.0**-24  # below any that weights or activations of a model have


def quantized(program: Any, conversion: Conversion, plan: Plan) -> nn.Module:
    """Return the int8 form of what ``torch.export`` recorded, ranges of the plan's images.

    Convolutions and linear layers are quantized, but for those that the plan keeps; norms,
    activations and products of feature maps stay in float32.
    """
    pt2e = optional_import("torchao.quantization.pt2e.quantize_pt2e", "executorch")
    # What the images of calibration number is no business of the bounds of the file.
    module = program.module(check_guards=False)
    layers = {name for name, layer in layers_of(module).items() if is_quantized(layer)}
    model = pt2e.prepare_pt2e(module, _quantizer(layers - plan.kept))
    with torch.no_grad():
        for batch in conversion.calibration_batches(plan.images):
            model(batch)
    result: nn.Module = pt2e.convert_pt2e(model)
    return result


def is_quantized(layer: Layer) -> bool:
    """Tell whether a layer is quantized at all.

    The mean and variance of a norm decide over whole maps, and have to be exact.
    """
    name = f"{ChannelMean.__module__}.{ChannelMean.__qualname__}"
    return not layer.is_product and all(kind != name for _, kind in layer.modules)


def _quantizer(names: Collection[str]) -> Any:
    """Return XNNPACK's quantizer for the layers of these names."""
    xnnpack = optional_import(
        "executorch.backends.xnnpack.quantizer.xnnpack_quantizer", "executorch"
    )
    quantizer, aten = xnnpack.XNNPACKQuantizer(), torch.ops.aten
    for operator in (aten.conv2d.default, aten.linear.default):
        quantizer.set_operator_type(operator, _ranges())
    quantizer.set_filter_function(lambda node: node.name in names)
    return quantizer


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
