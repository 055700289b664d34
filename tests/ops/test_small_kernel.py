"""Small-kernel aggregation: definition, paths, types, layouts, errors."""

import itertools

import pytest
import torch
from op_checks import LAYOUTS, assert_matches_reference

from backbones import ops
from backbones.errors import InputSizeError


def arguments(batch, channels, groups, k, height, width, dtype=torch.float64):
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    return [x, torch.randn(batch, groups, k * k, height, width, dtype=dtype)]


def by_loops(x, weight, k):
    out = torch.zeros_like(x)
    height, width = x.shape[2:]
    for c, i, j, a, b in itertools.product(
        range(x.shape[1]), range(height), range(width), range(k), range(k)
    ):
        row, col = i - k // 2 + a, j - k // 2 + b
        if 0 <= row < height and 0 <= col < width:
            out[:, c, i, j] += x[:, c, row, col] * weight[:, c % weight.shape[1], k * a + b, i, j]
    return out


@pytest.mark.parametrize("k", [1, 3, 5])
def test_reference_is_the_definition(k):
    x, weight = arguments(2, 6, 3, k, 4, 5)
    with ops.use_reference():
        out = ops.small_kernel_aggregation(x, weight)
    assert torch.allclose(out, by_loops(x, weight, k), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("channels", "groups", "k", "height", "width"),
    [
        (16, 2, 3, 7, 9),
        (16, 2, 3, 8, 6),
        (8, 8, 3, 3, 3),
        (4, 1, 1, 3, 3),
        (6, 3, 5, 5, 5),
        (6, 3, 5, 4, 1),  # a kernel wider than the map
        (6, 3, 7, 1, 4),
        (8, 4, 3, 1, 1),
        (4, 1, 3, 1, 1),
        (64, 8, 3, 28, 28),  # more products than one go takes
    ],
)
def test_paths_agree(layout, batch, channels, groups, k, height, width):
    change = LAYOUTS[layout]
    inputs = [change(x) for x in arguments(batch, channels, groups, k, height, width)]
    assert_matches_reference(ops.small_kernel_aggregation, inputs)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradcheck(k):
    inputs = [x.requires_grad_() for x in arguments(2, 4, 2, k, 3, 4)]
    assert torch.autograd.gradcheck(ops.small_kernel_aggregation, inputs)


def test_gradient_of_one_argument_alone():
    x, weight = arguments(1, 4, 2, 3, 5, 5)
    for leaf, other in ((0, 1), (1, 0)):
        inputs = [x.clone(), weight.clone()]
        inputs[leaf].requires_grad_()
        ops.small_kernel_aggregation(*inputs).sum().backward()
        assert inputs[leaf].grad.abs().sum() > 0
        assert inputs[other].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype):
    x, weight = (t.to(dtype) for t in arguments(2, 8, 2, 3, 9, 7))
    out = ops.small_kernel_aggregation(x, weight)
    exact = ops.small_kernel_aggregation(x.double(), weight.double())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() / 2


def test_types_may_differ_and_the_map_decides():
    x, weight = arguments(1, 4, 2, 3, 5, 5, torch.float32)
    assert ops.small_kernel_aggregation(x.bfloat16(), weight).dtype == torch.bfloat16
    assert ops.small_kernel_aggregation(x, weight.bfloat16()).dtype == torch.float32


def test_channels_last_stays_channels_last():
    x, weight = arguments(2, 8, 2, 3, 6, 5)
    out = ops.small_kernel_aggregation(LAYOUTS["channels_last"](x), weight)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert ops.small_kernel_aggregation(x, weight).is_contiguous()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((1, 4, 5), (1, 2, 9, 5, 5), "takes x"),
        ((1, 4, 5, 5), (1, 2, 4, 5, 5), "4 taps"),
        ((1, 4, 5, 5), (1, 2, 8, 5, 5), "8 taps"),
        ((1, 4, 5, 5), (1, 2, 9, 5, 6), "agree"),
        ((2, 4, 5, 5), (1, 2, 9, 5, 5), "agree"),
        ((1, 4, 5, 5), (1, 3, 9, 5, 5), "no multiple"),
    ],
)
def test_shapes_that_do_not_fit(x, weight, message):
    with pytest.raises(InputSizeError, match=message):
        ops.small_kernel_aggregation(torch.zeros(x), torch.zeros(weight))
