"""Small linear layers of every geometry, random values for them, and comparisons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

# 5 x 6: kernels reach across it, so that most pixels see a border where there is padding.
FEATURE_MAP = (2, 8, 5, 6)
TOKENS = (2, 5, 8)

UNPADDED = {
    "1x1": {"kernel_size": 1},
    "odd": {"kernel_size": 3},
    "even_strided": {"kernel_size": 4, "stride": 2},
    "rectangular_dilated": {"kernel_size": (2, 3), "dilation": (2, 1), "padding": (0, 0)},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 8, "out_channels": 8},
    "depthwise_multiplier": {"kernel_size": 2, "groups": 8, "out_channels": 16, "stride": 2},
    "valid_dilated": {"kernel_size": 3, "groups": 2, "dilation": 2, "padding": "valid"},
}
PADDED = {
    "padded": {"kernel_size": 3, "padding": 1},
    "padded_1x1": {"kernel_size": 1, "padding": 1},
    "padded_even_strided": {"kernel_size": 4, "padding": 2, "stride": 3},
    "padded_one_way": {"kernel_size": 3, "padding": (0, 1)},
    "padded_grouped": {"kernel_size": 5, "padding": (1, 2), "groups": 2},
    "padded_depthwise": {
        "kernel_size": 3,
        "padding": 2,
        "groups": 8,
        "out_channels": 8,
        "dilation": 2,
    },
    "padded_multiplier": {"kernel_size": 3, "padding": 1, "groups": 8, "out_channels": 24},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same_even": {"kernel_size": 4, "padding": "same", "groups": 4, "out_channels": 12},
}
GEOMETRIES = {**UNPADDED, **PADDED}
EVERY_LAYER = [*GEOMETRIES, "linear"]
EVERY_UNPADDED = [*UNPADDED, "linear"]
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


@torch.no_grad()
def randomized(module):
    """In float64 and evaluation mode, with factors of both signs, some of them exactly zero."""
    module.double().eval()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
            continue
        tensor.normal_()
        if tensor.ndim == 1 and len(tensor) > 2:
            tensor[0], tensor[1] = 0, -tensor[1].abs()
    return module


def linear_layer(kind="odd", bias=True, **changes):
    """A linear layer of 8 channels, to 6 where the kind does not say otherwise."""
    if kind == "linear":
        return nn.Linear(8, changes.get("out_channels", 6), bias=bias)
    options = {"out_channels": 6, **GEOMETRIES[kind], **changes}
    return nn.Conv2d(8, bias=bias, **options)


def width(linear):
    return len(linear.weight)


def input_of(linear):
    return torch.randn(
        TOKENS if isinstance(linear, nn.Linear) else FEATURE_MAP, dtype=torch.float64
    )


def by_channel(values, linear):
    """`values` as they stand beside the outputs, or inputs, of a linear layer."""
    return values if isinstance(linear, nn.Linear) else values.view(-1, 1, 1)


def on_rows(values, linear, rows, rest):
    """`values` on some of the outputs, `rest` on the others."""
    full = values.new_full((width(linear),), rest)
    full[rows] = values
    return by_channel(full, linear)


@torch.no_grad()
def value(module, x):
    return module(x)


def assert_same(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_unchanged(module, before):
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def conv(kind="padded", bias=False):
    return linear_layer(kind, bias, out_channels=8)
