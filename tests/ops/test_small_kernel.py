"""Small-kernel aggregation and correlation: definition, paths, types, layouts, errors."""

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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_of_all_channels_need_no_groups(layout):
    x, weight = (LAYOUTS[layout](x) for x in arguments(2, 6, 1, 3, 4, 5))
    expected = ops.small_kernel_aggregation(x, weight)
    assert_matches_reference(ops.small_kernel_aggregation, [x, weight[:, 0]])
    assert torch.equal(ops.small_kernel_aggregation(x, weight[:, 0]), expected)


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
        ((1, 4, 5, 5), (9, 5, 5), "takes x"),
        ((1, 4, 5, 5), (1, 8, 5, 5), "8 taps"),
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


# Correlation.


def maps(batch, channels, height, width, dtype=torch.float64):
    return list(torch.randn(2, batch, channels, height, width, dtype=dtype))


def correlation(k):
    return lambda query, key: ops.small_kernel_correlation(query, key, k)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_reference_of_the_correlation_is_its_definition(k):
    query, key = maps(2, 3, 4, 5)
    expected = torch.zeros(2, k * k, 4, 5, dtype=torch.float64)
    for i, j, a, b in itertools.product(range(4), range(5), range(k), range(k)):
        row, col = i - k // 2 + a, j - k // 2 + b
        if 0 <= row < 4 and 0 <= col < 5:
            expected[:, k * a + b, i, j] = (query[:, :, i, j] * key[:, :, row, col]).sum(1)
    with ops.use_reference():
        out = ops.small_kernel_correlation(query, key, k)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("channels", "k", "height", "width"),
    [(8, 3, 7, 9), (1, 3, 3, 3), (5, 1, 2, 3), (6, 5, 4, 1), (6, 7, 1, 4), (4, 3, 1, 1)],
)
def test_paths_of_the_correlation_agree(layout, batch, channels, k, height, width):
    inputs = [LAYOUTS[layout](x) for x in maps(batch, channels, height, width)]
    found = assert_matches_reference(correlation(k), inputs)
    without_gradients = correlation(k)(*inputs)
    assert torch.allclose(without_gradients, found, rtol=0, atol=1e-13)


def test_the_correlation_is_the_gradient_of_the_aggregation():
    x, weight = arguments(2, 6, 1, 3, 4, 5)
    grad = torch.randn_like(x)
    out = ops.small_kernel_aggregation(x, weight.requires_grad_())
    (expected,) = torch.autograd.grad(out, weight, grad)
    found = ops.small_kernel_correlation(grad, x, 3)
    assert torch.allclose(found.unsqueeze(1), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradcheck_of_the_correlation(k):
    inputs = [x.requires_grad_() for x in maps(2, 2, 3, 4)]
    assert torch.autograd.gradcheck(correlation(k), inputs)


def test_gradient_of_one_argument_of_the_correlation_alone():
    for leaf, other in ((0, 1), (1, 0)):
        inputs = maps(1, 4, 5, 5)
        inputs[leaf].requires_grad_()
        ops.small_kernel_correlation(*inputs, 3).sum().backward()
        assert inputs[leaf].grad.abs().sum() > 0
        assert inputs[other].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_correlation_rounds_half_types_once(dtype):
    query, key = (t.to(dtype) for t in maps(2, 8, 9, 7))
    out = ops.small_kernel_correlation(query, key, 3)
    exact = ops.small_kernel_correlation(query.double(), key.double(), 3)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() / 2


@pytest.mark.parametrize(
    ("query", "key", "k"),
    [((4, 5, 5), (4, 5, 5), 3), ((1, 4, 5, 5), (1, 4, 5, 6), 3), ((1, 4, 5, 5), (1, 4, 5, 5), 2)],
)
def test_what_does_not_fit_a_correlation(query, key, k):
    with pytest.raises(InputSizeError, match="odd kernel size, not"):
        ops.small_kernel_correlation(torch.zeros(query), torch.zeros(key), k)
