"""Involution: definition, paths, types, layouts, errors."""

import itertools

import pytest
import torch
from op_checks import LAYOUTS, assert_matches_reference

from backbones import ops
from backbones.errors import InputSizeError


def arguments(batch, channels, groups, k, height, width, stride=1, dtype=torch.float64):
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    size = [-(-side // stride) for side in (height, width)]
    return [x, torch.randn(batch, groups, k * k, *size, dtype=dtype)]


def by_loops(x, weight, k, stride):
    height, width = x.shape[2:]
    share = x.shape[1] // weight.shape[1]
    out = x.new_zeros(*x.shape[:2], *weight.shape[3:])
    for c, i, j, a, b in itertools.product(
        range(x.shape[1]), *map(range, weight.shape[3:]), range(k), range(k)
    ):
        row, col = stride * i - k // 2 + a, stride * j - k // 2 + b
        if 0 <= row < height and 0 <= col < width:
            out[:, c, i, j] += x[:, c, row, col] * weight[:, c // share, k * a + b, i, j]
    return out


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_reference_is_the_definition(k, stride):
    x, weight = arguments(2, 6, 3, k, 5, 8, stride)
    with ops.use_reference():
        out = ops.involution(x, weight, stride)
    assert torch.allclose(out, by_loops(x, weight, k, stride), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("channels", "groups", "k", "height", "width", "stride"),
    [
        (32, 2, 7, 9, 11, 1),
        (8, 8, 3, 4, 6, 1),
        (6, 1, 5, 3, 1, 1),  # a kernel wider than the map
        (32, 2, 7, 8, 10, 2),
        (32, 2, 7, 9, 7, 2),  # the last position stands for a part
        (4, 2, 7, 1, 2, 2),
        (4, 2, 1, 5, 4, 2),  # phases that no tap reads
        (4, 2, 3, 7, 8, 3),
        (4, 2, 5, 4, 9, 8),  # a stride wider than the kernel
    ],
)
def test_paths_agree(layout, channels, groups, k, height, width, stride):
    inputs = map(LAYOUTS[layout], arguments(2, channels, groups, k, height, width, stride))
    assert_matches_reference(lambda x, weight: ops.involution(x, weight, stride), list(inputs))


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(stride):
    inputs = [x.requires_grad_() for x in arguments(2, 4, 2, 3, 3, 4, stride)]
    assert torch.autograd.gradcheck(lambda x, weight: ops.involution(x, weight, stride), inputs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype, stride):
    x, weight = (t.to(dtype) for t in arguments(2, 8, 2, 7, 9, 7, stride))
    out = ops.involution(x, weight, stride)
    exact = ops.involution(x.double(), weight.double(), stride)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() / 2


def test_types_may_differ_and_the_map_decides():
    x, weight = arguments(1, 4, 2, 3, 5, 5, dtype=torch.float32)
    assert ops.involution(x.bfloat16(), weight).dtype == torch.bfloat16
    assert ops.involution(x, weight.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("stride", [1, 2])
def test_channels_last_stays_channels_last(stride):
    x, weight = arguments(2, 8, 2, 3, 6, 5, stride)
    out = ops.involution(LAYOUTS["channels_last"](x), weight, stride)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert ops.involution(x, weight, stride).is_contiguous()


@pytest.mark.parametrize(
    ("x", "weight", "stride", "message"),
    [
        ((1, 4, 5), (1, 2, 9, 5, 5), 1, "takes x"),
        ((1, 4, 5, 5), (1, 2, 9, 5, 5), 0, "stride=0"),
        ((1, 4, 5, 5), (1, 2, 4, 5, 5), 1, "4 taps"),
        ((1, 4, 5, 5), (1, 2, 8, 5, 5), 1, "8 taps"),
        ((1, 4, 5, 5), (1, 2, 9, 5, 6), 1, "height 5 and width 5"),
        ((1, 4, 5, 5), (1, 2, 9, 2, 2), 2, "height 3 and width 3"),  # a pool that rounds down
        ((2, 4, 5, 5), (1, 2, 9, 5, 5), 1, "batch 2"),
        ((1, 4, 5, 5), (1, 3, 9, 5, 5), 1, "no multiple"),
    ],
)
def test_shapes_that_do_not_fit(x, weight, stride, message):
    with pytest.raises(InputSizeError, match=message):
        ops.involution(torch.zeros(x), torch.zeros(weight), stride)
