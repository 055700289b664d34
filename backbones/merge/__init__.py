"""The algebra of exact merges: what follows from a layer being linear, written once.

A linear layer is an ``nn.Conv2d`` or ``nn.Linear``: ``y = W x + b``, with zeros around the input of
a padded convolution. A norm in evaluation mode is ``s * n(x) + t`` per channel, where `n` has no
parameters (for a batch norm it is the identity). Each rule moves one such factor or offset into a
linear layer, which is changed in place; it holds for every parameter value and at every input size,
borders included, and does nothing where nothing is left to move or where it would not hold.

Values are computed in float64 and stored in the layer's own type, device and memory layout. Rules
work on the meta device too. Modules must be in evaluation mode (`reparameterize` checks).
"""

from backbones.merge.factors import (
    factor_into_norm,
    factor_into_outputs,
    function_into_parameter,
    scale_into_directions,
    scale_into_previous,
    scale_parameter,
)
from backbones.merge.linear_layers import (
    average_linear_layers,
    branches_into_kernel,
    constant_query_into_keys,
    contrast_into_next,
    linear_into_next,
    mean_as_output,
    pass_outputs_into_kernel,
    rotation_into_next,
    split_contrast,
    stack_linear_layers,
    sum_linear_layers,
)
from backbones.merge.norms import (
    center_outputs,
    fold_chain,
    map_norm_into_next,
    norm_into_next,
    norm_into_previous,
    norm_into_shortcut,
    norm_of_constant,
)
from backbones.merge.offsets import (
    biases_into_next,
    drop_softmax_bias,
    shift_into_next,
    shift_into_previous,
    shift_together,
    uniform_bias_into_next,
)
from backbones.merge.recording import (
    record,
    recorded,
)
from backbones.merge.values import (
    is_linear_layer,
    is_unpadded,
)

__all__ = [
    "average_linear_layers",
    "biases_into_next",
    "branches_into_kernel",
    "center_outputs",
    "constant_query_into_keys",
    "contrast_into_next",
    "drop_softmax_bias",
    "factor_into_norm",
    "factor_into_outputs",
    "fold_chain",
    "function_into_parameter",
    "is_linear_layer",
    "is_unpadded",
    "linear_into_next",
    "map_norm_into_next",
    "mean_as_output",
    "norm_into_next",
    "norm_into_previous",
    "norm_into_shortcut",
    "norm_of_constant",
    "pass_outputs_into_kernel",
    "record",
    "recorded",
    "rotation_into_next",
    "scale_into_directions",
    "scale_into_previous",
    "scale_parameter",
    "shift_into_next",
    "shift_into_previous",
    "shift_together",
    "split_contrast",
    "stack_linear_layers",
    "sum_linear_layers",
    "uniform_bias_into_next",
]
