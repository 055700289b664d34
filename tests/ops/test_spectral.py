"""Spectral filter: definition, the matrices behind it, resizing, types, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import LAYOUTS, assert_matches_reference

from backbones import ops
from backbones.errors import InputSizeError


def arguments(batch, channels, height, width, bins=None, dtype=torch.float64):
    rows, cols = bins or (height, width // 2 + 1)
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    return [x, torch.randn(channels, rows, cols, 2, dtype=dtype)]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 4), (3, 1)])
def test_reference_is_a_circular_convolution(height, width):
    """With the real kernel that the filter's inverse transform gives."""
    x, weight = arguments(2, 3, height, width)
    kernel = torch.fft.irfft2(torch.view_as_complex(weight), s=(height, width))
    expected = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            expected += kernel[:, i, j, None, None] * x.roll((i, j), (2, 3))
    with ops.use_reference():
        out = ops.spectral_filter(x, weight)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (7, 7),
        (14, 14),
        (12, 16),
        (1, 1),
        (2, 1),
        (1, 5),
        (13, 15),
        (16, 16),
        (24, 25),
        (32, 31),
        (34, 20),
        (20, 32),
        (48, 9),
    ],
)
def test_paths_agree(layout, batch, height, width):
    inputs = [LAYOUTS[layout](x) for x in arguments(batch, 4, height, width)]
    assert_matches_reference(ops.spectral_filter, inputs)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 48), st.integers(1, 48))
def test_exact_on_every_small_map(height, width):
    assert_matches_reference(ops.spectral_filter, arguments(1, 2, height, width))


@pytest.mark.parametrize(
    ("height", "width", "bins"),
    [(12, 16, (14, 8)), (6, 8, (7, 4)), (20, 14, (3, 3)), (5, 5, (1, 1))],
)
def test_a_filter_of_another_size_is_resized(height, width, bins):
    x, weight = arguments(2, 3, height, width, bins)
    out = assert_matches_reference(ops.spectral_filter, [x, weight])
    target = (height, width // 2 + 1)
    parts = [
        F.interpolate(weight[None, ..., part], target, mode="bilinear", align_corners=True)[0]
        for part in (0, 1)
    ]
    resized = torch.stack(parts, -1)
    assert torch.allclose(ops.resize_filter(weight, (height, width)), resized, rtol=0, atol=1e-14)
    assert torch.allclose(ops.spectral_filter(x, resized), out, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [7, 14, 24, 32, 64])
def test_no_images_give_none(size):
    x, weight = arguments(0, 2, size, size)
    assert ops.spectral_filter(x, weight).shape == x.shape


def test_a_filter_of_the_right_size_is_left_alone():
    weight = torch.randn(3, 6, 4, 2)
    assert ops.resize_filter(weight, (6, 7)) is weight
    assert ops.resize_filter(weight, (6, 6)) is weight


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3), (13, 12), (24, 2), (48, 2)])
def test_gradcheck(height, width):
    inputs = [x.requires_grad_() for x in arguments(1, 1, height, width, bins=(2, 2))]
    assert torch.autograd.gradcheck(ops.spectral_filter, inputs)


@pytest.mark.parametrize("size", [5, 15, 24])
def test_a_first_call_in_inference_mode_leaves_later_ones_differentiable(size):
    x, weight = (t.requires_grad_() for t in arguments(1, 2, size, size, dtype=torch.float32))
    ops.spectral._on_cpu.cache_clear()
    with torch.inference_mode():
        ops.spectral_filter(x.detach(), weight.detach())
    ops.spectral_filter(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 14, 24, 48])
def test_half_types_are_rounded_once(dtype, size):
    x, weight = (t.to(dtype) for t in arguments(1, 4, size, size))
    out = ops.spectral_filter(x, weight)
    exact = ops.spectral_filter(x.double(), weight.double())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_a_spectrum_beyond_float16_does_not_overflow():
    x = torch.full((1, 1, 32, 32), 3000.0, dtype=torch.float16)  # its mean bin is 96000
    weight = torch.zeros(1, 32, 17, 2, dtype=torch.float16)
    weight[..., 0] = 1
    assert torch.allclose(ops.spectral_filter(x, weight).float(), x.float())


@pytest.mark.parametrize("size", [7, 14, 24])
def test_autocast_leaves_spectra_in_float32(size):
    x, weight = arguments(1, 4, size, size, dtype=torch.float32)
    expected = ops.spectral_filter(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.spectral_filter(x, weight), expected)


def test_another_default_type_or_an_earlier_call_changes_nothing():
    x, weight = arguments(1, 2, 6, 7)
    expected = ops.spectral_filter(x, weight)
    with torch.inference_mode():
        ops.spectral_filter(x.float(), weight.float())
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(ops.spectral_filter(x, weight), expected)
        assert ops.spectral_filter(x.float(), weight.float()).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert_matches_reference(ops.spectral_filter, [x, weight])


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        ((1, 4, 6), (4, 6, 4, 2)),
        ((1, 4, 6, 6), (4, 6, 4)),
        ((1, 4, 6, 6), (4, 6, 4, 3)),
        ((1, 4, 6, 6), (3, 6, 4, 2)),
    ],
)
def test_shapes_that_do_not_fit(x, weight):
    with pytest.raises(InputSizeError, match="takes x"):
        ops.spectral_filter(torch.zeros(x), torch.zeros(weight))
