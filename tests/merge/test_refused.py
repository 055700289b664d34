"""Where a rule does not hold it refuses, or does nothing."""

from __future__ import annotations

import pytest
import torch
from merge_layers import assert_same, conv, linear_layer, randomized, value
from merge_scenes import (
    AveragedBetween,
    Centered,
    FactorAfterNorm,
    OneAfterTheOther,
    Parallel,
    PartlyPassed,
    Rotated,
    Scene,
    SideBySide,
    SumOfShares,
)
from timm.layers import BatchNormAct2d, LayerNorm2d, LayerNormAct2d
from torch import nn

from backbones import merge


class Chained(Scene):
    def __init__(self, *parts):
        super().__init__()
        self.chain = nn.Sequential(*parts)

    def forward(self, x):
        return self.chain(x)

    def fold(self):
        merge.fold_chain(self.chain)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def shared_activation():
    act = nn.ReLU()
    return Chained(conv(), act, conv(), act, nn.BatchNorm2d(8), conv())


def parallel(large, small=None):
    scene = Parallel(identity=small is None)
    scene.convs = nn.ModuleList([large] if small is None else [large, small])
    return scene


def depthwise(kernel_size, padding, **options):
    return nn.Conv2d(8, 8, kernel_size, padding=padding, groups=8, **options)


def reflecting():
    scene = PartlyPassed()
    scene.conv = nn.Conv2d(5, 5, 3, padding=1, groups=5, padding_mode="reflect")
    return scene


def narrowing():
    scene = AveragedBetween()
    scene.first, scene.second = nn.Linear(8, 5), nn.Linear(5, 6)
    return scene


def strided_share():
    scene = SumOfShares(True, True, True)
    for part in scene.convs:
        part.stride = 2, 2
    return scene


REFUSED = {
    "linear_layer_of_another_width": narrowing,
    "center_grouped": lambda: Centered(linear_layer("grouped")),
    "center_depthwise": lambda: Centered(linear_layer("padded_depthwise")),
    "stack_grouped": lambda: SideBySide(linear_layer("grouped"), linear_layer("grouped")),
    "linear_layer_into_a_padded_one": lambda: OneAfterTheOther(
        nn.Conv2d(8, 8, 1), nn.Conv2d(16, 5, 1, padding=1)
    ),
    "wide_layer_into_the_next": lambda: OneAfterTheOther(
        nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 5, 1)
    ),
    "grouped_layer_into_the_next": lambda: OneAfterTheOther(
        nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(16, 5, 1)
    ),
    "layer_of_another_width_into_the_next": lambda: OneAfterTheOther(
        nn.Conv2d(8, 6, 1), nn.Conv2d(14, 5, 1)
    ),
    "rotation_into_a_multiplier": lambda: Rotated(linear_layer("padded_multiplier")),
    "sum_of_a_strided_share": strided_share,
    "padding_mode_of_a_new_convolution": reflecting,
    "activation_in_a_batch_norm": lambda: Chained(conv(), BatchNormAct2d(8)),
    "activation_in_a_layer_norm": lambda: Chained(LayerNormAct2d(8), conv("1x1")),
    "layer_norm_over_columns": lambda: Chained(nn.LayerNorm(8), conv("1x1")),
    "one_activation_at_two_places": shared_activation,
    "sequential_with_a_forward_of_its_own": lambda: Chained(Residual(conv()), nn.BatchNorm2d(8)),
    "branch_beside_a_dilated_kernel": lambda: parallel(
        depthwise(5, 4, dilation=2), depthwise(3, 1)
    ),
    "identity_beside_a_rectangular_kernel": lambda: parallel(depthwise((7, 3), (3, 1))),
    "branch_beside_a_rectangular_kernel": lambda: parallel(
        depthwise((3, 5), (1, 2)), depthwise(3, 1)
    ),
    "factor_into_a_norm_without_offset": lambda: FactorAfterNorm(LayerNorm2d(8, bias=False)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_refuses_what_it_cannot_do(name):
    scene = randomized(REFUSED[name]())
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    expected = value(scene, x)
    try:
        scene.fold()
    except ValueError:
        return
    assert_same(value(scene, x), expected)
