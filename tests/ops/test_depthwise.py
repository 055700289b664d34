"""Depthwise convolution: values and gradients are PyTorch's, and come by the fast way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones import ops

LAST = torch.channels_last
by_onednn = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="x86 processors only"
)
# kernel, padding, dilation, height, width
CASES = [
    ((5, 5), (2, 2), (1, 1), 16, 20),
    ((7, 7), (3, 3), (1, 1), 5, 3),
    ((5, 9), (2, 4), (1, 1), 11, 13),
    ((1, 7), (0, 9), (1, 3), 12, 10),
    ((3, 3), (2, 2), (2, 2), 14, 15),
    ((5, 5), (6, 6), (3, 3), 9, 16),
    ((17, 17), (8, 8), (1, 1), 20, 18),
    ((17, 17), (8, 8), (1, 1), 5, 6),
    ((7, 7), (3, 3), (1, 1), 40, 30),
    ((5, 5), (4, 4), (2, 2), 8, 40),
    ((13, 13), (6, 6), (1, 1), 6, 5),
    ((5, 5), (0, 1), (1, 1), 9, 8),
]


def results(function, x, weight, bias, dtype):
    inputs = [one.to(dtype).requires_grad_() for one in (x, weight, bias)]
    y = function(*inputs)
    ramp = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
    return y, torch.autograd.grad(y, inputs, ramp)


@by_onednn
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel, padding, dilation, height, width", CASES)
def test_values_and_gradients(kernel, padding, dilation, height, width, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 24, height, width, generator=generator).contiguous(memory_format=layout)
    weight = torch.randn(24, 1, *kernel, generator=generator)
    bias = torch.randn(24, generator=generator)

    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, 1, padding, dilation, 24)

    def ours(x, weight, bias):
        return ops.depthwise_conv2d(x, weight, bias, padding, dilation)

    whole = [one.to(dtype).double() for one in (x, weight, bias)]
    expected, of_expected = results(plain, *whole, torch.float64)
    found, of_found = results(ours, x, weight, bias, dtype)
    assert type(found.grad_fn).__name__ == "_DepthwiseBackward"
    assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip((expected, *of_expected), (found, *of_found), strict=True):
        assert other.dtype == dtype
        atol = tolerance * float(one.abs().max())
        torch.testing.assert_close(other.double(), one, rtol=0, atol=atol)


@by_onednn
def test_gradients_can_be_differentiated():
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    weight = torch.randn(4, 1, 5, 5, requires_grad=True)

    def second(function):
        (first,) = torch.autograd.grad(function(x, weight).pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight))

    expected = second(lambda x, w: F.conv2d(x, w, None, 1, 2, 1, 4))
    found = second(lambda x, w: ops.depthwise_conv2d(x, w, None, (2, 2)))
    for one, other in zip(expected, found):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_other_cases_are_pytorchs():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 5, 5, requires_grad=True)
    with torch.no_grad():
        assert ops.depthwise_conv2d(x, weight).grad_fn is None
    small, band = (torch.randn(4, 1, *k, requires_grad=True) for k in ((3, 3), (1, 7)))
    for given in ((x.double(), weight.double()), (x, small), (x, band), (x[:0], weight)):
        assert "Convolution" in type(ops.depthwise_conv2d(*given).grad_fn).__name__
    with ops.use_reference():
        assert "Convolution" in type(ops.depthwise_conv2d(x, weight).grad_fn).__name__


def test_transforms_of_functions():
    x, weight = torch.randn(3, 2, 4, 8, 8), torch.randn(4, 1, 5, 5)

    def loss(weight, x):
        return ops.depthwise_conv2d(x, weight, None, (2, 2)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    expected = [torch.func.grad(loss)(weight, one) for one in x]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_compiled_and_exported():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1, 5, 5))

        def forward(self, x):
            return ops.depthwise_conv2d(x, self.weight, None, (2, 2))

    model, x = Model(), torch.randn(2, 4, 8, 8)
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    exported = torch.export.export(model, (x,)).module()(x)
    for found in (compiled, exported):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
