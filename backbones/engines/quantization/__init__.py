"""int8: ranges of values, what each layer adds to the error, and which stay in float32."""

from backbones.engines.quantization.equalization import equalize, equalized
from backbones.engines.quantization.layers import (
    CONVOLUTIONS,
    OPERATORS,
    Layer,
    layers_of,
    outputs_of,
)
from backbones.engines.quantization.ranges import Range
from backbones.engines.quantization.search import Plan, to_target

__all__ = [
    "CONVOLUTIONS",
    "OPERATORS",
    "Layer",
    "Plan",
    "Range",
    "equalize",
    "equalized",
    "layers_of",
    "outputs_of",
    "to_target",
]
