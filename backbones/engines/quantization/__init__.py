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
from backbones.engines.quantization.search import (
    Plan,
    agreement_of,
    tells_classes,
    to_target,
)

__all__ = [
    "CONVOLUTIONS",
    "OPERATORS",
    "Layer",
    "Plan",
    "Range",
    "agreement_of",
    "equalize",
    "equalized",
    "layers_of",
    "outputs_of",
    "tells_classes",
    "to_target",
]
