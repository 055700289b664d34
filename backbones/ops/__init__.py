"""Operators with a plain reference and faster paths.

Each is one function. Its reference is its definition; the path is chosen by shape, device and
whether the operations are being recorded, and every path is tested against the reference in
values and gradients. :func:`use_reference` forces the reference.
"""

from backbones.ops.adaptive_spectral import adaptive_spectral_filter
from backbones.ops.attentive import attentive_convolution
from backbones.ops.depthwise import depthwise_conv2d, gradients_are_ours, is_slow_kernel
from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    is_recorded,
    reference_active,
    use_reference,
    without_autocast,
)
from backbones.ops.involution import involution
from backbones.ops.low_frequencies import amplify_low_frequencies
from backbones.ops.means import adaptive_mean, mean_matrix
from backbones.ops.neighborhood import neighborhood_aggregation, neighborhood_bias
from backbones.ops.small_kernel import small_kernel_aggregation, small_kernel_correlation
from backbones.ops.spectral import resize_filter, spectral_filter

__all__ = [
    "adaptive_mean",
    "amplify_low_frequencies",
    "adaptive_spectral_filter",
    "at_least_float32",
    "attentive_convolution",
    "depthwise_conv2d",
    "gradients_are_ours",
    "involution",
    "fixed",
    "is_recorded",
    "is_slow_kernel",
    "mean_matrix",
    "neighborhood_aggregation",
    "neighborhood_bias",
    "reference_active",
    "resize_filter",
    "small_kernel_aggregation",
    "small_kernel_correlation",
    "spectral_filter",
    "use_reference",
    "without_autocast",
]
