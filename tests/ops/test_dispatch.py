"""The switch to the reference."""

import pytest
import torch

from backbones import ops


def path_of(function, *inputs):
    """The names of all operations between the inputs and the result."""
    names, waiting = set(), [function(*(x.requires_grad_() for x in inputs)).grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [before for before, _ in node.next_functions if before is not None]
    return names


def test_switch_nests_and_closes_after_an_error():
    assert not ops.reference_active()
    with ops.use_reference():
        with ops.use_reference():
            assert ops.reference_active()
        assert ops.reference_active()
    with pytest.raises(RuntimeError, match="inside"), ops.use_reference():
        raise RuntimeError("inside")
    assert not ops.reference_active()


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (ops.attentive_convolution, [(1, 4, 5, 5), (1, 4, 3, 3)]),
        (ops.small_kernel_aggregation, [(1, 4, 5, 5), (1, 2, 9, 5, 5)]),
        (lambda q, k: ops.small_kernel_correlation(q, k, 3), [(1, 4, 5, 5), (1, 4, 5, 5)]),
        (lambda v, a: ops.neighborhood_aggregation(v, a, 3), [(1, 2, 3, 5, 5), (1, 2, 5, 5, 9)]),
        (ops.spectral_filter, [(1, 2, 14, 14), (2, 14, 8, 2)]),
        (ops.adaptive_spectral_filter, [(1, 2, 14, 14), *[(4, 4, 1, 1), (4,)] * 2]),
        (lambda t: ops.neighborhood_bias(t, (5, 5)), [(1, 5, 5)]),
    ],
)
def test_switch_changes_the_path(function, shapes):
    inputs = [torch.randn(shape) for shape in shapes]
    fast = path_of(function, *inputs)
    with ops.use_reference():
        assert path_of(function, *inputs) != fast
    assert path_of(function, *inputs) == fast
