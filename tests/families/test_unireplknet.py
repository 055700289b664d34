"""What is particular to UniRepLKNet: kernels by block, and the branches beside large kernels."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from damping import DAMPING
from golden import fill
from torch import nn

import backbones
from backbones.errors import ConfigError
from backbones.families.unireplknet import BRANCHES
from backbones.layers import BranchedConv

PARAMETERS = {
    "unireplknet_a": 4649060,
    "unireplknet_f": 6489328,
    "unireplknet_p": 11080520,
    "unireplknet_n": 18818880,
    "unireplknet_t": 31693420,
    "unireplknet_s": 56456704,
    "unireplknet_b": 99089416,
    "unireplknet_l": 220076056,
    "unireplknet_xl": 388690984,
}
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "device": "meta"}


def kernels(model):
    """The depthwise kernel of each block, by stage."""
    result = []
    for stage in model.stages:
        mixers = [block.conv_dw for block in stage.blocks]
        convs = [m if isinstance(m, nn.Conv2d) else m.large.conv for m in mixers]
        assert all(conv.groups == conv.in_channels for conv in convs)
        result.append([conv.kernel_size[0] for conv in convs])
    return result


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models(family="unireplknet"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unireplknet_a", [[3] * 2, [13] * 2, [13] * 6, [13] * 2]),
        ("unireplknet_n", [[3] * 2, [13] * 2, [13] * 8, [13] * 2]),
        ("unireplknet_t", [[3] * 3, [13] * 3, [13, 3] * 9, [13] * 3]),
        ("unireplknet_xl", [[3] * 3, [13] * 3, [13, 3, 3] * 9, [13] * 3]),
    ],
)
def test_kernels_of_the_blocks(name, expected):
    assert kernels(backbones.create_model(name, device="meta")) == expected


def test_a_list_of_kernels_is_cycled_even_where_it_does_not_divide_the_depth():
    model = backbones.create_model(
        "unireplknet_a", kernel_sizes=[5, [7, 3], [9, 11, 15], 17], device="meta"
    )
    assert kernels(model) == [[5, 5], [7, 3], [9, 11, 15, 9, 11, 15], [17, 17]]


@pytest.mark.parametrize("kernel_sizes", [8, [3, 13, [13, 1], 13], [3, 13, [], 13]])
def test_kernels_that_do_not_exist_are_refused(kernel_sizes):
    with pytest.raises(ConfigError, match="kernel_sizes"):
        backbones.create_model(
            "unireplknet_a", kernel_sizes=kernel_sizes, **{**SMALL, "depths": [1, 1, 2, 1]}
        )


@pytest.mark.parametrize("kernel_size", BRANCHES)
@torch.no_grad()
def test_branches_add_up_to_one_kernel(kernel_size):
    """Spread each dilated kernel over the taps it touches: one dense convolution gives the sum."""
    conv = BranchedConv(4, kernel_size, BRANCHES[kernel_size]).double().eval()
    for key, value in conv.state_dict().items():
        if value.is_floating_point():
            value.copy_(fill(key, tuple(value.shape)))
    dense = torch.zeros(4, 1, kernel_size, kernel_size, dtype=torch.float64)
    bias = torch.zeros(4, dtype=torch.float64)
    for part in (conv.large, *conv.branches.values()):
        kernel, dilation = part.conv.kernel_size[0], part.conv.dilation[0]
        scale = part.norm.weight / (part.norm.running_var + part.norm.eps).sqrt()
        reach = dilation * (kernel // 2)
        taps = slice(kernel_size // 2 - reach, kernel_size // 2 + reach + 1, dilation)
        dense[:, :, taps, taps] += part.conv.weight * scale.view(-1, 1, 1, 1)
        bias += part.norm.bias - part.norm.running_mean * scale
    x = torch.randn(2, 4, 19, 6, dtype=torch.float64)
    expected = F.conv2d(x, dense, bias, padding=kernel_size // 2, groups=4)
    assert (conv(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert len(conv.branches) == len(BRANCHES[kernel_size])


def test_a_branch_beyond_the_large_kernel_is_refused():
    with pytest.raises(ValueError, match="reaches beyond 7"):
        BranchedConv(4, 7, ((3, 4),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_finite_on_a_wide_input(dtype):
    model = backbones.create_model("unireplknet_a").eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            factors = [f for p, f in DAMPING["unireplknet"] if re.search(p, key)]
            value.copy_(fill(key, tuple(value.shape)) * (factors or [1])[0])
    output = model.to(dtype)(fill("input", (1, 3, 384, 128)).to(dtype))
    assert torch.isfinite(output).all()
    assert output.std() > 0.1
