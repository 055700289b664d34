"""The operators under ``torch.func`` and differentiated more than once."""

import itertools

import pytest
import torch
from op_checks import LAYOUTS
from torch.func import grad, hessian, jvp, vjp, vmap

from backbones import ops


def attentive(k, channels, height, width):
    shapes = [(2, channels, height, width), (2, channels, k, k)]
    return ops.attentive_convolution, shapes


def small_kernel(k, channels, groups, height, width):
    shapes = [(2, channels, height, width), (2, groups, k * k, height, width)]
    return ops.small_kernel_aggregation, shapes


def involution(k, channels, groups, height, width, stride):
    size = [-(-side // stride) for side in (height, width)]
    shapes = [(2, channels, height, width), (2, groups, k * k, *size)]
    return (lambda x, w: ops.involution(x, w, stride)), shapes


def correlation(k, channels, height, width):
    shape = (2, channels, height, width)
    return (lambda query, key: ops.small_kernel_correlation(query, key, k)), [shape, shape]


def neighborhood(k, height, width, groups=2, channels=2):
    shapes = [(2, groups, channels, height, width), (2, groups, height, width, k * k)]
    return (lambda v, a: ops.neighborhood_aggregation(v, a, k)), shapes


def spectral(height, width, rows, columns):
    return ops.spectral_filter, [(2, 2, height, width), (2, rows, columns, 2)]


def adaptive(height, width):
    def function(x, numbers):
        w1, b1, w2, b2 = numbers.split((16, 4, 16, 4))
        weights = w1.reshape(4, 4, 1, 1), w2.reshape(4, 4, 1, 1)
        return ops.adaptive_spectral_filter(x, weights[0], b1, weights[1], b2)

    return function, [(2, 2, height, width), (40,)]


CASES = {
    "attentive": attentive(3, 2, 3, 2),
    "attentive_wide": attentive(5, 2, 2, 1),
    "small_kernel": small_kernel(3, 4, 2, 3, 2),
    "kernel_of_one": small_kernel(1, 2, 2, 2, 2),
    "wide_kernel": small_kernel(5, 3, 1, 2, 1),
    "involution": involution(3, 4, 2, 3, 2, 1),
    "involution_strided": involution(3, 4, 2, 3, 4, 2),
    "correlation": correlation(3, 4, 3, 2),
    "wide_correlation": correlation(5, 3, 2, 1),
    "one_window": neighborhood(3, 3, 3),
    "one_tile": neighborhood(2, 3, 4),
    "tiles": neighborhood(2, 9, 29, 1, 1),
    "bias": ((lambda t: ops.neighborhood_bias(t, (3, 4))), [(2, 5, 5)]),
    "spectral_dense": spectral(3, 4, 3, 3),
    "spectral_resized": spectral(3, 2, 2, 2),
    "spectral_separable": spectral(13, 12, 13, 7),
    "spectral_mixed": spectral(24, 2, 24, 2),
    "spectral_fast": spectral(48, 1, 48, 1),
    "adaptive_dense": adaptive(3, 4),
    "adaptive_separable": adaptive(13, 12),
    "adaptive_fast": adaptive(48, 1),
}
SMALL = ["attentive", "small_kernel", "correlation", "one_tile", "spectral_resized"]


def leaves(shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same(found, expected):
    assert expected.std() > 0
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def by_reference(function, *inputs):
    with ops.use_reference():
        return function(*inputs)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients(name):
    function, shapes = CASES[name]
    fast = name not in SMALL  # along one direction instead of one by one
    assert torch.autograd.gradgradcheck(function, leaves(shapes), fast_mode=fast)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name, requires_grad):
    function, shapes = CASES[name]
    inputs, tangents = ([x.detach() for x in leaves(shapes)] for _ in range(2))
    for x in inputs:
        x.requires_grad_(requires_grad)
    expected = by_reference(lambda: jvp(function, tuple(inputs), tuple(tangents)))
    for a, b in zip(jvp(function, tuple(inputs), tuple(tangents)), expected, strict=True):
        assert_same(a, b)
    one_alone = jvp(lambda x: function(x, *inputs[1:]), (inputs[0],), (tangents[0],))[1]
    nothing = [torch.zeros_like(x) for x in tangents[1:]]
    assert_same(one_alone, jvp(function, tuple(inputs), (tangents[0], *nothing))[1])


@pytest.mark.filterwarnings("error:There is a performance drop")  # a loop over the samples
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "contiguous") for name in CASES),
        *itertools.product(SMALL, ["channels_last", "strided"]),
    ],
)
def test_mapped_over_any_axis(name, layout, requires_grad):
    function, shapes = CASES[name]
    first, second = (
        [LAYOUTS[layout](torch.randn(shape, dtype=torch.float64)) for shape in shapes] for _ in "ab"
    )
    for dims in [(None, 0), (0, None), (0, 0), (1, -1)] if len(shapes) == 2 else [(0,), (-1,)]:
        mixed = [x if dim is None else y for x, y, dim in zip(first, second, dims, strict=True)]
        expected = torch.stack([function(*first), function(*mixed)])
        inputs = [
            x if dim is None else torch.stack([x, y]).movedim(0, dim)
            for x, y, dim in zip(first, second, dims, strict=True)
        ]
        inputs = [x.detach().requires_grad_(requires_grad) for x in inputs]
        assert_same(vmap(function, dims)(*inputs), expected)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_sample(name):
    function, shapes = CASES[name]
    stacked = [x.detach() for x in leaves([(3, *shape) for shape in shapes])]
    every = tuple(range(len(shapes)))
    scalar = lambda *inputs: function(*inputs).sin().sum()  # noqa: E731
    found = vmap(grad(scalar, argnums=every))(*stacked)
    alone = [x.requires_grad_() for x in stacked]
    expected = by_reference(
        lambda: torch.autograd.grad(sum(scalar(*(x[i] for x in alone)) for i in range(3)), alone)
    )
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)
    outside = torch.autograd.grad(vmap(scalar)(*alone).sum(), alone)
    for a, b in zip(outside, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", SMALL)
def test_hessians(name):
    function, shapes = CASES[name]
    inputs = [x.detach() for x in leaves(shapes)]
    scalar = lambda *inputs: function(*inputs).sin().sum()  # noqa: E731
    every = tuple(range(len(shapes)))
    found = hessian(scalar, argnums=every)(*inputs)
    expected = by_reference(torch.autograd.functional.hessian, scalar, tuple(inputs))
    for rows, others in zip(found, expected, strict=True):
        for a, b in zip(rows, others, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_forward_mode(name):
    function, shapes = CASES[name]
    inputs, tangents = (tuple(x.detach() for x in leaves(shapes)) for _ in range(2))

    def directional():
        along = lambda *inputs: jvp(lambda *x: function(*x).sin(), inputs, tangents)[1]  # noqa: E731
        out, pull_back = vjp(along, *inputs)
        return pull_back(torch.ones_like(out))

    for a, b in zip(directional(), by_reference(directional), strict=True):
        assert_same(a, b)
