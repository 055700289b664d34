"""The operators on a GPU give what they give on the CPU."""

import pytest
import torch
from op_checks import value_and_gradients

from backbones import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def neighborhood(height, width, k):
    inputs = [torch.randn(2, 2, 3, height, width), torch.rand(2, 2, height, width, k * k)]
    return lambda v, a: ops.neighborhood_aggregation(v, a, k), inputs


CASES = {
    "attentive": (
        ops.attentive_convolution,
        [torch.randn(2, 16, 9, 11), torch.randn(2, 16, 3, 3)],
    ),
    "small_kernel": (
        ops.small_kernel_aggregation,
        [torch.randn(2, 16, 9, 11), torch.randn(2, 4, 9, 9, 11)],
    ),
    "involution": (
        lambda x, w: ops.involution(x, w, 2),
        [torch.randn(2, 16, 9, 10), torch.randn(2, 4, 49, 5, 5)],
    ),
    "correlation": (
        lambda query, key: ops.small_kernel_correlation(query, key, 3),
        list(torch.randn(2, 2, 16, 9, 11)),
    ),
    "one_tile": neighborhood(14, 13, 13),
    "tiles": neighborhood(20, 33, 5),
    "bias": (lambda t: ops.neighborhood_bias(t, (9, 7)), [torch.randn(2, 9, 9)]),
    "spectral": (ops.spectral_filter, [torch.randn(2, 4, 14, 13), torch.randn(4, 14, 8, 2)]),
    "adaptive_spectral": (
        ops.adaptive_spectral_filter,
        [torch.randn(2, 4, 14, 12), *[torch.randn(8, 4, 1, 1) / 2, torch.randn(8)] * 2],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    function, inputs = CASES[name]
    inputs = [x.double() for x in inputs]
    expected = value_and_gradients(function, inputs)
    found = value_and_gradients(function, [x.cuda() for x in inputs])
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cuda"
        assert torch.allclose(a.cpu(), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(name, dtype):
    function, inputs = CASES[name]
    inputs = [x.to(dtype) for x in inputs]
    expected = function(*(x.double() for x in inputs))
    found, *gradients = value_and_gradients(function, [x.cuda() for x in inputs])
    error = (found.double().cpu() - expected).abs().max()
    assert found.dtype == dtype
    assert error <= 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_autocast(name):
    function, inputs = CASES[name]
    inputs = [x.cuda() for x in inputs]
    expected = function(*inputs)
    with torch.autocast("cuda", torch.bfloat16):
        found = value_and_gradients(function, inputs)[0]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
