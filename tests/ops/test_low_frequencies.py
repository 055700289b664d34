"""Low frequencies by a product of low rank: the filter's definition, and sizes left open."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import LAYOUTS, assert_matches_reference
from torch import nn

from backbones import ops

GAINS = ((2, 1.25, -0.5), (1, 7.0, 2.5), (1, -1.0, 0.3))
RADII = pytest.mark.parametrize("radius", [1, 2, 3])


def amplify(radius):
    return lambda x: ops.amplify_low_frequencies(x, radius, GAINS)


class Amplify(nn.Module):
    def __init__(self, radius):
        super().__init__()
        self.radius = radius

    def forward(self, x):
        return ops.amplify_low_frequencies(x, self.radius, GAINS)


@RADII
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(7, 7), (14, 12), (9, 16), (1, 1), (2, 5), (4, 4), (3, 1)])
def test_equal_to_the_filter_in_the_spectrum(radius, layout, size):
    x = LAYOUTS[layout](torch.randn(2, 4, *size, dtype=torch.float64))
    assert_matches_reference(amplify(radius), [x])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))
def test_exact_on_every_small_map(height, width, radius):
    assert_matches_reference(
        amplify(radius), [torch.randn(1, 4, height, width, dtype=torch.float64)]
    )


@RADII
def test_waves_gain_by_their_distance_from_zero(radius):
    """A wave inside the radius, one on it and one beyond, by the factors that are documented."""
    turns = torch.arange(12, dtype=torch.float64) / 12
    for order, column in ((radius - 1, 1), (radius, 2), (radius + 1, None)):
        wave = (2 * torch.pi * order * turns + 0.3).cos()
        x = wave.expand(1, 4, 12, 12)
        gains = [share[column] if column else 0 for share in GAINS for _ in range(share[0])]
        expected = x * (1 + torch.tensor(gains, dtype=torch.float64)).view(1, -1, 1, 1)
        assert torch.allclose(amplify(radius)(x), expected, rtol=0, atol=1e-13)


@RADII
def test_graphs_hold_for_every_size_where_sizes_are_open(radius):
    module = Amplify(radius)
    free = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(module, (torch.randn(2, 4, 9, 11),), dynamic_shapes=(free,))
    for size in [(9, 11), (2, 16), (4, 3), (56, 40)]:
        x = torch.randn(2, 4, *size)
        assert torch.allclose(program.module()(x), module(x), rtol=1e-5, atol=1e-5), size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_in_range_and_near(dtype):
    x = torch.full((1, 4, 56, 56), 100.0, dtype=dtype)  # the sum over a map is 313600
    out = amplify(2)(x)
    exact = amplify(2)(x.double())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_gradcheck():
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(amplify(2), [x])
    assert torch.autograd.gradgradcheck(amplify(2), [x])
