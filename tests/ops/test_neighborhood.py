"""Neighborhood aggregation and its position bias: definition, paths, memory, errors."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import LAYOUTS, assert_matches_reference

from backbones import ops
from backbones.errors import InputSizeError


def arguments(batch, groups, channels, height, width, k, dtype=torch.float64):
    value = torch.randn(batch, groups, channels, height, width, dtype=dtype)
    return [value, torch.randn(batch, groups, height, width, k * k, dtype=dtype).softmax(-1)]


def start(i, length, k):
    return min(max(i - k // 2, 0), length - k)


@pytest.mark.parametrize(("height", "width", "k"), [(4, 5, 3), (5, 4, 4), (3, 3, 3), (6, 4, 2)])
def test_reference_is_the_definition(height, width, k):
    value, attention = arguments(2, 2, 3, height, width, k)
    expected = torch.zeros_like(value)
    for i, j, a, b in itertools.product(range(height), range(width), range(k), range(k)):
        key = value[..., start(i, height, k) + a, start(j, width, k) + b]
        expected[..., i, j] += key * attention[:, :, None, i, j, k * a + b]
    with ops.use_reference():
        out = ops.neighborhood_aggregation(value, attention, k)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "k"),
    [
        (5, 5, 5),  # one window for all
        (6, 5, 5),
        (14, 14, 13),
        (9, 14, 4),
        (7, 7, 1),
        (16, 17, 5),  # several tiles
        (30, 41, 13),
        (9, 64, 6),
    ],
)
def test_paths_agree(layout, batch, height, width, k):
    change = LAYOUTS[layout]
    inputs = [change(x) for x in arguments(batch, 2, 3, height, width, k)]
    assert_matches_reference(lambda v, a: ops.neighborhood_aggregation(v, a, k), inputs)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_size_and_kernel(data):
    k = data.draw(st.integers(1, 9))
    height, width = (data.draw(st.integers(k, 40)) for _ in range(2))
    inputs = arguments(1, 1, 1, height, width, k)
    assert_matches_reference(lambda v, a: ops.neighborhood_aggregation(v, a, k), inputs)


@pytest.mark.parametrize(("height", "width", "k"), [(4, 5, 3), (3, 3, 3), (4, 5, 4)])
def test_gradcheck(height, width, k):
    inputs = [x.requires_grad_() for x in arguments(2, 1, 2, height, width, k)]
    assert torch.autograd.gradcheck(lambda v, a: ops.neighborhood_aggregation(v, a, k), inputs)


def test_gradcheck_over_tiles():
    inputs = [x.requires_grad_() for x in arguments(1, 1, 1, 3, 87, 2)]
    function = lambda v, a: ops.neighborhood_aggregation(v, a, 2)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [14, 20])
def test_half_types_are_rounded_once(dtype, size):
    value, attention = (t.to(dtype) for t in arguments(1, 2, 4, size, size, 13))
    out = ops.neighborhood_aggregation(value, attention, 13)
    exact = ops.neighborhood_aggregation(value.double(), attention.double(), 13)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() / 2


def test_types_may_differ_and_the_values_decide():
    value, attention = arguments(1, 2, 4, 7, 7, 5, torch.float32)
    assert ops.neighborhood_aggregation(value.bfloat16(), attention, 5).dtype == torch.bfloat16
    assert ops.neighborhood_aggregation(value, attention.bfloat16(), 5).dtype == torch.float32


def test_autocast_leaves_the_sums_in_float32():
    value, attention = arguments(1, 2, 4, 14, 14, 13, torch.float32)
    expected = ops.neighborhood_aggregation(value, attention, 13)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.neighborhood_aggregation(value, attention, 13), expected)


def status_mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def peak_growth_mib(k):
    """How far the process's memory rises above its level before the call, while in it."""
    inputs = arguments(1, 8, 16, 64, 64, k, torch.float32)
    with torch.no_grad():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status_mib("VmRSS")
        ops.neighborhood_aggregation(*inputs, k)
        return status_mib("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_kernel():
    # Result 2 MiB; all windows would be 2 * k * k MiB.
    assert peak_growth_mib(3) < 16
    assert peak_growth_mib(13) < 16
    with ops.use_reference():
        assert peak_growth_mib(13) > 300


@pytest.mark.parametrize(
    ("value", "attention", "k", "message"),
    [
        ((1, 2, 3, 5, 5), (1, 2, 5, 5, 49), 7, "does not fit into a map of 5 x 5"),
        ((1, 2, 3, 9, 5), (1, 2, 9, 5, 49), 7, "does not fit into a map of 9 x 5"),
        ((1, 2, 3, 5, 5), (1, 2, 5, 5, 0), 0, "0 x 0"),
        ((1, 2, 3, 5, 5), (1, 2, 5, 5, 25), 3, "need attention"),
        ((1, 2, 3, 5, 6), (1, 2, 6, 5, 9), 3, "need attention"),
        ((2, 3, 5, 5), (2, 3, 5, 5, 9), 3, "takes value"),
    ],
)
def test_shapes_that_do_not_fit(value, attention, k, message):
    with pytest.raises(InputSizeError, match=message):
        ops.neighborhood_aggregation(torch.zeros(value), torch.zeros(attention), k)


@pytest.mark.parametrize(
    ("height", "width", "k"), [(5, 5, 5), (6, 9, 5), (14, 13, 13), (4, 7, 4), (3, 2, 1)]
)
def test_bias_is_the_definition_on_every_path(height, width, k):
    table = torch.randn(2, 2 * k - 1, 2 * k - 1, dtype=torch.float64)
    expected = torch.empty(2, height, width, k * k, dtype=torch.float64)
    for i, j, a, b in itertools.product(range(height), range(width), range(k), range(k)):
        row = start(i, height, k) - i + k - 1 + a
        col = start(j, width, k) - j + k - 1 + b
        expected[:, i, j, k * a + b] = table[:, row, col]
    assert torch.equal(ops.neighborhood_bias(table, (height, width)), expected)
    assert_matches_reference(lambda t: ops.neighborhood_bias(t, (height, width)), [table])


def test_bias_follows_its_table():
    table = torch.randn(1, 5, 5)
    first = ops.neighborhood_bias(table, (4, 4))
    assert torch.equal(ops.neighborhood_bias(table * 2, (4, 4)), first * 2)
    assert ops.neighborhood_bias(table.double(), (4, 4)).dtype == torch.float64
    assert ops.neighborhood_bias(table.to("meta"), (4, 4)).device.type == "meta"


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 5, 3), (5, 5)])
def test_bias_refuses_other_tables(shape):
    with pytest.raises(InputSizeError, match="table"):
        ops.neighborhood_bias(torch.zeros(shape), (9, 9))


def test_bias_refuses_a_small_map():
    with pytest.raises(InputSizeError, match="3 x 3 does not fit into a map of 9 x 2"):
        ops.neighborhood_bias(torch.zeros(1, 5, 5), (9, 2))
