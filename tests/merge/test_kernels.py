"""Parallel branches, the identity and passed channels become one kernel."""

from __future__ import annotations

import pytest
import torch
from merge_layers import BIAS, FEATURE_MAP, assert_same, randomized, value
from merge_scenes import Parallel, PartlyPassed, assert_exact
from torch import nn

from backbones import merge

SOME = (True, False, True, False, True, False)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("biases", [(True,) * 6, (False,) * 6, SOME, tuple(not b for b in SOME)])
def test_parallel_depthwise_kernels_become_one(biases, identity):
    scene = Parallel(biases, identity)
    counts = dict(Parallel.counts)
    scene.counts = counts if identity else {"parallel branch into a kernel": 5}
    # The second fold has one convolution and no identity: nothing to add.
    assert_exact(scene)
    assert (scene.convs[0].bias is not None) == any(biases)


@BIAS
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_identity_alone_goes_into_a_kernel(kernel_size, bias):
    conv = randomized(nn.Conv2d(8, 8, kernel_size, padding=kernel_size // 2, groups=8, bias=bias))
    x = torch.randn(FEATURE_MAP, dtype=torch.float64)
    expected = value(conv, x) + x
    merge.branches_into_kernel(conv, identity=True)
    assert_same(value(conv, x), expected)
    assert (conv.bias is not None) == bias


@BIAS
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), ((1, 5), 1), ((7, 3), 2)])
def test_channels_that_pass_go_into_a_kernel(kernel_size, dilation, bias):
    scene = assert_exact(PartlyPassed(kernel_size, bias, dilation))
    assert (scene.conv.bias is not None) == bias
    assert scene.conv.groups == scene.conv.in_channels == scene.conv.out_channels == 8
