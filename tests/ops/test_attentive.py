"""Attentive convolution: definition, paths, types, layouts, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from op_checks import LAYOUTS, assert_matches_reference

from backbones import ops
from backbones.errors import InputSizeError


def arguments(batch, channels, k, height, width, dtype=torch.float64):
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    return [x, torch.randn(batch, channels, k, k, dtype=dtype)]


def by_loops(x, kernels):
    out, k = torch.zeros_like(x), kernels.shape[2]
    for i, j, a, b in itertools.product(*map(range, (*x.shape[2:], k, k))):
        row, col = i - k // 2 + a, j - k // 2 + b
        if 0 <= row < x.shape[2] and 0 <= col < x.shape[3]:
            out[:, :, i, j] += x[:, :, row, col] * kernels[:, :, a, b]
    return out


@pytest.mark.parametrize("k", [1, 3, 5])
def test_reference_is_the_definition(k):
    x, kernels = arguments(2, 3, k, 4, 5)
    with ops.use_reference():
        out = ops.attentive_convolution(x, kernels)
    assert torch.allclose(out, by_loops(x, kernels), rtol=0, atol=1e-13)


def test_each_image_is_convolved_by_its_own_kernels():
    x, kernels = arguments(3, 4, 3, 6, 5)
    alone = [
        F.conv2d(one[None], kernel[:, None], padding=1, groups=4)
        for one, kernel in zip(x, kernels, strict=True)
    ]
    assert torch.allclose(ops.attentive_convolution(x, kernels), torch.cat(alone), atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("channels", "k", "height", "width"),
    [
        (16, 3, 7, 9),
        (8, 3, 3, 3),
        (4, 1, 3, 3),
        (6, 5, 5, 6),
        (6, 5, 4, 1),  # kernels wider than the map
        (6, 7, 1, 4),
        (8, 3, 1, 1),
        (32, 3, 28, 28),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_paths_agree(layout, batch, channels, k, height, width, dtype, tolerance):
    inputs = arguments(batch, channels, k, height, width, dtype)
    assert_matches_reference(
        ops.attentive_convolution, [LAYOUTS[layout](x) for x in inputs], tolerance
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_one_convolution_only_where_it_is_fast(enabled):
    """oneDNN has depthwise convolutions in float32; PyTorch's own go from group to group."""
    inputs = [x.requires_grad_() for x in arguments(2, 3, 3, 5, 5, torch.float32)]
    with torch.backends.mkldnn.flags(enabled=enabled and torch.backends.mkldnn.is_available()):
        found = ops.attentive_convolution(*inputs)
        with torch.profiler.profile() as profile:
            ops.attentive_convolution(*inputs)
    names = {event.key for event in profile.key_averages()}
    assert ("aten::conv2d" in names) == (enabled and torch.backends.mkldnn.is_available())
    assert torch.allclose(found, by_loops(*(x.detach() for x in inputs)), atol=1e-5)


def test_without_images_or_channels_out_comes_nothing():
    for dtype, shape in itertools.product((torch.float32, torch.float64), ((0, 3), (2, 0))):
        x = torch.randn(*shape, 4, 5, dtype=dtype)
        kernels = torch.randn(*shape, 3, 3, dtype=dtype)
        assert ops.attentive_convolution(x, kernels).shape == x.shape


@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradcheck(k):
    inputs = [x.requires_grad_() for x in arguments(2, 2, k, 3, 4)]
    assert torch.autograd.gradcheck(ops.attentive_convolution, inputs)


def test_second_derivatives_of_the_one_convolution():
    def hessian(*inputs):
        scalar = lambda x, kernels: ops.attentive_convolution(x, kernels).sin().sum()  # noqa: E731
        return torch.autograd.functional.hessian(scalar, inputs)

    single = arguments(1, 2, 3, 3, 2, torch.float32)
    with ops.use_reference():
        expected = hessian(*(x.double() for x in single))
    for found, wanted in zip(sum(hessian(*single), ()), sum(expected, ()), strict=True):
        assert wanted.abs().max() > 0.1
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_gradient_of_one_argument_alone():
    for leaf, other in ((0, 1), (1, 0)):
        inputs = arguments(1, 4, 3, 5, 5)
        inputs[leaf].requires_grad_()
        ops.attentive_convolution(*inputs).sum().backward()
        assert inputs[leaf].grad.abs().sum() > 0
        assert inputs[other].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype):
    x, kernels = (t.to(dtype) for t in arguments(2, 8, 3, 9, 7))
    out = ops.attentive_convolution(x, kernels)
    exact = ops.attentive_convolution(x.double(), kernels.double())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() / 2


def test_types_may_differ_and_the_map_decides():
    x, kernels = arguments(1, 4, 3, 5, 5, torch.float32)
    assert ops.attentive_convolution(x.bfloat16(), kernels).dtype == torch.bfloat16
    assert ops.attentive_convolution(x, kernels.bfloat16()).dtype == torch.float32


def test_autocast_leaves_it_alone():
    x, kernels = arguments(1, 4, 3, 5, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attentive_convolution(x, kernels)
    assert torch.equal(out, ops.attentive_convolution(x, kernels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last_stays_channels_last(dtype):
    x, kernels = arguments(2, 8, 3, 6, 5, dtype)
    out = ops.attentive_convolution(LAYOUTS["channels_last"](x), kernels)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert ops.attentive_convolution(x, kernels).is_contiguous()


@pytest.mark.parametrize(
    ("x", "kernels", "message"),
    [
        ((4, 5, 5), (1, 4, 3, 3), "takes x"),
        ((1, 4, 5, 5), (1, 4, 9), "takes x"),
        ((1, 4, 5, 5), (1, 4, 2, 2), "2 x 2"),
        ((1, 4, 5, 5), (1, 4, 3, 1), "3 x 1"),
        ((2, 4, 5, 5), (1, 4, 3, 3), "agree in batch and channels"),
        ((1, 4, 5, 5), (1, 2, 3, 3), "agree in batch and channels"),
    ],
)
def test_shapes_that_do_not_fit(x, kernels, message):
    with pytest.raises(InputSizeError, match=message):
        ops.attentive_convolution(torch.zeros(x), torch.zeros(kernels))
