"""Chains of modules: each norm finds the linear layer that takes it."""

from __future__ import annotations

import copy

import pytest
import torch
from merge_layers import (
    FEATURE_MAP,
    assert_same,
    assert_unchanged,
    conv,
    randomized,
    snapshot,
    value,
)
from timm.layers import Conv2dSame, LayerNorm2d
from torch import nn

from backbones import merge


def fold(chain, shape=FEATURE_MAP):
    """Fold a chain, check that it computes the same, twice; return what was counted."""
    randomized(chain)
    x = torch.randn(shape, dtype=torch.float64)
    expected = value(chain, x)
    with merge.recorded() as counts:
        merge.fold_chain(chain)
    assert_same(value(chain, x), expected)
    before = snapshot(chain)
    with merge.recorded() as again:
        merge.fold_chain(chain)
    assert not again
    assert_unchanged(chain, before)
    return counts


BEFORE, AFTER = "norm into the linear layer before", "norm into the linear layer after"


def kinds(chain):
    return [type(module) for module in chain]


def test_a_batch_norm_goes_into_an_unpadded_layer_after_it_and_spares_a_bias():
    chain = nn.Sequential(conv(), nn.BatchNorm2d(8), conv("1x1"))
    assert fold(chain) == {AFTER: 1}
    assert kinds(chain) == [nn.Conv2d, nn.Identity, nn.Conv2d]
    assert chain[0].bias is None and chain[2].bias is not None


@pytest.mark.parametrize("after", [conv(), nn.ReLU(), Conv2dSame(8, 8, 3), None])
def test_a_batch_norm_goes_into_the_layer_before_where_it_cannot_go_on(after):
    chain = nn.Sequential(*[conv(), nn.BatchNorm2d(8), after][: 2 if after is None else 3])
    assert fold(chain) == {BEFORE: 1}
    assert type(chain[1]) is nn.Identity and chain[0].bias is not None


def test_a_batch_norm_between_what_takes_none_stays():
    chain = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), conv())
    assert not fold(chain)
    assert kinds(chain) == [nn.ReLU, nn.BatchNorm2d, nn.Conv2d]


def test_identities_in_a_chain_are_skipped():
    chain = nn.Sequential(
        nn.Identity(), conv(), nn.Identity(), nn.BatchNorm2d(8), nn.Identity(), nn.Identity()
    )
    assert fold(chain) == {BEFORE: 1}
    chain = nn.Sequential(nn.BatchNorm2d(8), nn.Identity(), nn.Identity(), conv("1x1"))
    assert fold(chain) == {AFTER: 1}


def test_nested_chains_are_one():
    chain = nn.Sequential(
        nn.Sequential(nn.Sequential(conv(), nn.Sequential()), nn.Identity()),
        nn.Sequential(nn.BatchNorm2d(8), nn.Sequential(nn.ReLU(), conv("1x1"))),
        nn.Sequential(nn.Sequential(nn.Sequential(nn.BatchNorm2d(8)))),
        nn.Sequential(nn.Sequential(LayerNorm2d(8)), nn.Sequential(conv("odd"), nn.GELU())),
    )
    assert fold(chain) == {BEFORE: 2, AFTER: 1}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in chain.modules())
    assert chain[3][0][0].weight is None and chain[3][1][0].bias is not None


class Wrapped(nn.Module):
    """Ends with a linear layer and begins with one, but does more."""

    def __init__(self):
        super().__init__()
        self.conv = conv("1x1", True)

    def forward(self, x):
        return x + self.conv(x).relu()


@pytest.mark.parametrize("other", [nn.ReLU, Wrapped, lambda: nn.MaxPool2d(3, 1, 1)])
def test_other_modules_interrupt_a_chain(other):
    chain = nn.Sequential(conv(), other(), nn.BatchNorm2d(8), other(), conv("1x1"))
    assert not fold(chain)
    assert isinstance(chain[2], nn.BatchNorm2d)


def test_layer_and_group_norms_keep_their_statistics_in_a_chain():
    chain = nn.Sequential(LayerNorm2d(8), conv("1x1"), nn.GroupNorm(2, 8), conv(), LayerNorm2d(8))
    assert fold(chain) == {AFTER: 1}
    assert [norm.weight is None for norm in (chain[0], chain[2], chain[4])] == [True, False, False]


def test_each_norm_of_a_long_chain_finds_its_layer():
    chain = nn.Sequential(
        nn.BatchNorm2d(8),
        conv("1x1"),
        nn.BatchNorm2d(8),
        conv("padded_grouped", True),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        conv("depthwise"),
        nn.BatchNorm2d(8),
    )
    assert fold(chain, (2, 8, 7, 8)) == {AFTER: 2, BEFORE: 3}


def test_vectors_have_chains_too():
    chain = nn.Sequential(
        nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 6)
    )
    assert fold(chain, (7, 8)) == {AFTER: 2}


class Parts(nn.Module):
    """A chain by names, in another order than the modules were made, among other modules."""

    def __init__(self):
        super().__init__()
        self.second = nn.BatchNorm2d(8)
        self.other = nn.BatchNorm2d(8)
        self.first = nn.Sequential(conv())
        self.nothing = nn.Identity()
        self.absent = None

    def forward(self, x):
        return self.second(self.first(x)) + self.other(x)


def test_a_chain_by_names_leaves_the_other_modules():
    parts = randomized(Parts())
    x = torch.randn(FEATURE_MAP, dtype=torch.float64)
    expected, other = value(parts, x), snapshot(parts.other)
    merge.fold_chain(parts, ("first", "nothing", "second"))
    assert_same(value(parts, x), expected)
    assert type(parts.second) is nn.Identity
    assert_unchanged(parts.other, other)
    with merge.recorded() as counts:
        merge.fold_chain(parts, ("absent", "other", "absent"))
        merge.fold_chain(parts, ())
    assert not counts and isinstance(parts.other, nn.BatchNorm2d)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv("padded", True)

    def forward(self, x):
        return 2 * self.conv(x)

    def merged(self):
        merge.factor_into_outputs(self.conv, 2.0)
        return self.conv


def test_parts_with_a_merged_form_are_replaced_before_the_norms_are_folded():
    chain = nn.Sequential(nn.Sequential(Doubled()), nn.BatchNorm2d(8))
    assert fold(chain) == {"constant factor into the linear layer before": 1, BEFORE: 1}
    assert type(chain[0][0]) is nn.Conv2d


@pytest.mark.parametrize("bias", [True, False])
def test_a_chain_is_folded_on_the_meta_device(bias):
    chain = nn.Sequential(
        conv(bias=bias), nn.BatchNorm2d(8), nn.ReLU(), LayerNorm2d(8), conv("1x1")
    )
    other = copy.deepcopy(chain).to("meta").eval()
    assert fold(chain) == {BEFORE: 1, AFTER: 1}
    merge.fold_chain(other)
    found, expected = other.state_dict(), chain.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
