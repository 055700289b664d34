"""Adaptive spectral filter: definition, the paths, types, errors."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import LAYOUTS, assert_matches_reference

from backbones import ops
from backbones.errors import InputSizeError
from backbones.ops import adaptive_spectral


def arguments(batch, channels, height, width, groups=2, dtype=torch.float64):
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    wide, inputs = 2 * channels, 2 * channels // groups
    weights = [torch.randn(wide, inputs, 1, 1, dtype=dtype) / inputs**0.5 for _ in range(2)]
    first, second = (torch.randn(wide, dtype=dtype) for _ in range(2))
    return [x, weights[0], first, weights[1], second]


@pytest.mark.parametrize(("height", "width"), [(6, 4), (5, 3), (1, 4), (3, 1), (2, 2)])
@pytest.mark.parametrize(("act", "threshold"), [("silu", 0.01), ("relu", 0.3)])
def test_reference_is_the_formula(height, width, act, threshold):
    """With complex numbers one by one, and the inverse transform as a sum of waves."""
    groups, channels = 2, 4
    x, w1, b1, w2, b2 = arguments(1, channels, height, width, groups)
    with ops.use_reference():
        out = ops.adaptive_spectral_filter(x, w1, b1, w2, b2, act, threshold)
    spectrum = torch.fft.fft2(x[0], norm="ortho")
    expected = torch.zeros_like(x[0])
    row, column = torch.arange(height).double().view(-1, 1), torch.arange(width).double()
    for u in range(height):
        for v in range(width // 2 + 1):
            numbers = spectrum[:, u, v].unflatten(0, (groups, -1))
            z = torch.cat((numbers.real, numbers.imag), 1).flatten().view(1, -1, 1, 1)
            z = getattr(F, act)(F.conv2d(z, w1, b1, groups=groups))
            z = F.softshrink(F.conv2d(z, w2, b2, groups=groups), threshold)
            mask = torch.complex(*z.view(groups, 2, -1).unbind(1)).flatten()
            wave = torch.polar(
                torch.ones(height, width).double(),
                2 * torch.pi * (u * row / height + v * column / width),
            )
            times = 1 if v == 0 or 2 * v == width else 2
            expected += times * ((mask * spectrum[:, u, v]).view(-1, 1, 1) * wave).real
    expected /= (height * width) ** 0.5
    assert torch.allclose(out[0], expected, rtol=0, atol=1e-12)


def test_inverse_transform_is_irfft2():
    """Of a product that is the spectrum of no real map."""
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    mask = torch.randn(2, 2, 3, 6, 5, dtype=torch.float64)
    found = adaptive_spectral._by_transform(x, lambda *_: (mask[0], mask[1]))
    product = torch.complex(*mask) * torch.fft.rfft2(x)
    assert torch.allclose(found, torch.fft.irfft2(product, s=(6, 8)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("height", "width"),
    [(7, 7), (14, 14), (12, 16), (1, 1), (2, 1), (1, 5), (13, 15), (24, 25), (48, 9)],
)
def test_paths_agree(layout, height, width):
    inputs = [LAYOUTS[layout](x) for x in arguments(2, 8, height, width)[:1]]
    inputs += arguments(2, 8, height, width, groups=4)[1:]
    assert_matches_reference(ops.adaptive_spectral_filter, inputs)


def test_small_maps_take_no_transform(monkeypatch):
    inputs = arguments(1, 4, 14, 14)
    expected = ops.adaptive_spectral_filter(*inputs)
    monkeypatch.setattr(adaptive_spectral, "_by_transform", None)
    assert torch.equal(ops.adaptive_spectral_filter(*inputs), expected)


@pytest.mark.parametrize("size", [7, 14, 64])
def test_no_images_give_none(size):
    x, *layers = arguments(0, 4, size, size)
    assert ops.adaptive_spectral_filter(x, *layers).shape == x.shape


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3), (13, 12), (48, 2)])
def test_gradcheck(height, width):
    inputs = [x.requires_grad_() for x in arguments(1, 2, height, width, groups=1)]
    fast = height > 4
    assert torch.autograd.gradcheck(ops.adaptive_spectral_filter, inputs, fast_mode=fast)


@pytest.mark.parametrize("size", [5, 15])
def test_a_first_call_in_inference_mode_leaves_later_ones_differentiable(size):
    inputs = [x.float().requires_grad_() for x in arguments(1, 4, size, size)]
    adaptive_spectral._matrices_of_tensors.cache_clear()
    with torch.inference_mode():
        ops.adaptive_spectral_filter(*(x.detach() for x in inputs))
    ops.adaptive_spectral_filter(*inputs).sum().backward()
    assert all(x.grad is not None for x in inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 14, 48])
def test_half_types_are_rounded_once(dtype, size):
    inputs = [x.to(dtype) for x in arguments(1, 4, size, size)]
    out = ops.adaptive_spectral_filter(*inputs)
    exact = ops.adaptive_spectral_filter(*(x.double() for x in inputs))
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_a_spectrum_beyond_float16_does_not_overflow():
    x = torch.full((1, 1, 32, 32), 3000.0, dtype=torch.float16)  # its zero frequency is 96000
    weight = torch.zeros(2, 2, 1, 1, dtype=torch.float16)
    bias = torch.tensor([1.01, 0.0], dtype=torch.float16)
    out = ops.adaptive_spectral_filter(x, weight, bias, weight, bias, threshold=0.01)
    assert torch.allclose(out.float(), x.float(), rtol=1e-3)


@pytest.mark.parametrize("size", [7, 14])
def test_autocast_leaves_it_in_float32(size):
    inputs = arguments(1, 4, size, size, dtype=torch.float32)
    expected = ops.adaptive_spectral_filter(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.adaptive_spectral_filter(*inputs), expected)


@pytest.mark.parametrize(
    ("place", "shape"),
    [(0, (4, 6, 6)), (0, (1, 3, 6, 6)), (1, (8, 4)), (1, (8, 3, 1, 1)), (3, (8, 8, 1, 1)), (4, 4)],
)
def test_shapes_that_do_not_fit(place, shape):
    inputs = arguments(1, 4, 6, 6)
    inputs[place] = torch.zeros(shape)
    with pytest.raises(InputSizeError, match="takes x"):
        ops.adaptive_spectral_filter(*inputs)
