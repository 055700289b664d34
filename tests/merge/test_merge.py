"""Every rule of the merge algebra alone: a small module computes the same before and after it."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, LayerNorm2d, LayerNormAct2d
from torch import nn

from backbones import merge
from backbones.families.unireplknet import CenteredNorm2d

# 5 x 6: kernels reach across the map, so that most pixels see a border where there is padding.
MAP = (2, 8, 5, 6)
TOKENS = (2, 5, 8)

UNPADDED = {
    "1x1": {"kernel_size": 1},
    "odd": {"kernel_size": 3},
    "even_strided": {"kernel_size": 4, "stride": 2},
    "rectangular_dilated": {"kernel_size": (2, 3), "dilation": (2, 1), "padding": (0, 0)},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 8, "out_channels": 8},
    "depthwise_multiplier": {"kernel_size": 2, "groups": 8, "out_channels": 16, "stride": 2},
    "valid_dilated": {"kernel_size": 3, "groups": 2, "dilation": 2, "padding": "valid"},
}
PADDED = {
    "padded": {"kernel_size": 3, "padding": 1},
    "padded_1x1": {"kernel_size": 1, "padding": 1},
    "padded_even_strided": {"kernel_size": 4, "padding": 2, "stride": 3},
    "padded_one_way": {"kernel_size": 3, "padding": (0, 1)},
    "padded_grouped": {"kernel_size": 5, "padding": (1, 2), "groups": 2},
    "padded_depthwise": {
        "kernel_size": 3,
        "padding": 2,
        "groups": 8,
        "out_channels": 8,
        "dilation": 2,
    },
    "padded_multiplier": {"kernel_size": 3, "padding": 1, "groups": 8, "out_channels": 24},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same_even": {"kernel_size": 4, "padding": "same", "groups": 4, "out_channels": 12},
}
GEOMETRIES = {**UNPADDED, **PADDED}
EVERY_MAP = [*GEOMETRIES, "linear"]
EVERY_UNPADDED = [*UNPADDED, "linear"]
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@torch.no_grad()
def randomized(module):
    """In float64 and evaluation mode, with factors of both signs, some of them exactly zero."""
    module.double().eval()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
            continue
        tensor.normal_()
        if tensor.ndim == 1 and len(tensor) > 2:
            tensor[0], tensor[1] = 0, -tensor[1].abs()
    return module


def a_map(kind="odd", bias=True, **changes):
    """A map of 8 channels, to 6 where the kind does not say otherwise."""
    if kind == "linear":
        return nn.Linear(8, changes.get("out_channels", 6), bias=bias)
    options = {"out_channels": 6, **GEOMETRIES[kind], **changes}
    return nn.Conv2d(8, bias=bias, **options)


def width(linear):
    return len(linear.weight)


def input_of(linear):
    return torch.randn(TOKENS if isinstance(linear, nn.Linear) else MAP, dtype=torch.float64)


def by_channel(values, linear):
    """`values` as they stand beside the outputs, or inputs, of a map."""
    return values if isinstance(linear, nn.Linear) else values.view(-1, 1, 1)


def on_rows(values, linear, rows, rest):
    """`values` on some of the outputs, `rest` on the others."""
    full = values.new_full((width(linear),), rest)
    full[rows] = values
    return by_channel(full, linear)


@torch.no_grad()
def value(module, x):
    return module(x)


def assert_same(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_unchanged(module, before):
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def complex_rotation(x, rotation):
    """Multiply channels (2k, 2k + 1) as complex numbers."""
    turn = torch.complex(rotation[:, 0], rotation[:, 1]).view(-1, 1, 1)
    turned = torch.complex(x[:, 0::2].contiguous(), x[:, 1::2].contiguous()) * turn
    return torch.stack((turned.real, turned.imag), 2).flatten(1, 2)


# One small module for each rule. `fold` applies the rule as a layer would.


class Scene(nn.Module):
    shape = MAP
    counts: dict[str, int]

    def fold(self):
        raise NotImplementedError


class NormAfterMap(Scene):
    counts = {"norm into the map before": 1}

    def __init__(self, linear, **options):
        super().__init__()
        self.linear = linear
        # A batch norm has its channels in front of the positions.
        kind = nn.BatchNorm1d if isinstance(linear, nn.Linear) else nn.BatchNorm2d
        self.norm = kind(width(linear), **options)

    def forward(self, x):
        y = self.linear(x)
        if isinstance(self.linear, nn.Linear):
            return self.norm(y.mT).mT
        return self.norm(y)

    def fold(self):
        self.norm = merge.norm_into_previous(self.linear, self.norm)


class NormBeforeMap(Scene):
    counts = {"norm into the map after": 1}

    def __init__(self, norm, linear):
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x):
        if isinstance(self.norm, nn.BatchNorm1d):
            return self.linear(self.norm(x.mT).mT)
        return self.linear(self.norm(x))

    def fold(self):
        self.norm = merge.norm_into_next(self.norm, self.linear)


class Centered(Scene):
    counts = {"mean of a layer norm into the map before": 1}

    def __init__(self, conv, **options):
        super().__init__()
        self.conv, self.norm = conv, LayerNorm2d(width(conv), **options)

    def forward(self, x):
        return self.norm(self.conv(x))

    def fold(self):
        merge.center_outputs(self.conv)
        self.norm = CenteredNorm2d(self.norm)


class Scaled(Scene):
    counts = {"layer scale into the map before": 1}

    def __init__(self, linear, rows=slice(None)):
        super().__init__()
        self.linear, self.rows = linear, rows
        self.scale = nn.Parameter(torch.empty(len(range(width(linear))[rows])))

    def forward(self, x):
        y = self.linear(x)
        if self.scale is None:
            return y
        return y * on_rows(self.scale, self.linear, self.rows, 1)

    def fold(self):
        merge.scale_into_previous(self.linear, self.scale, self.rows)
        self.scale = None


class Shifted(Scene):
    """The offset may stand on a sibling branch, here the input's mean."""

    counts = {"offset into a bias": 1}

    def __init__(self, linear, rows=slice(None)):
        super().__init__()
        self.linear, self.rows = linear, rows
        self.shift = nn.Parameter(torch.empty(len(range(width(linear))[rows])))

    def forward(self, x):
        y, sibling = self.linear(x), x.mean()
        if self.shift is None:
            return y + sibling
        return y + (sibling + on_rows(self.shift, self.linear, self.rows, 0))

    def fold(self):
        merge.shift_into_previous(self.linear, self.shift, self.rows)
        self.shift = None


class ShiftedInput(Scene):
    counts = {"offset into a bias": 1}

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.shift = nn.Parameter(torch.empty(8))

    def forward(self, x):
        return self.linear(x if self.shift is None else x + by_channel(self.shift, self.linear))

    def fold(self):
        merge.shift_into_next(self.shift, self.linear)
        self.shift = None


class Factor(Scene):
    counts = {"constant factor into the map before": 1}

    def __init__(self, linear, rows=slice(None), factor=-0.37):
        super().__init__()
        self.linear, self.rows, self.factor = linear, rows, factor

    def forward(self, x):
        full = x.new_ones(width(self.linear))
        full[self.rows] = self.factor
        return self.linear(x) * by_channel(full, self.linear)

    def fold(self):
        self.factor = merge.factor_into_outputs(self.linear, self.factor, self.rows)


class FactorAfterNorm(Scene):
    counts = {"constant factor into the norm before": 1}

    def __init__(self, norm, factor=-0.37):
        super().__init__()
        self.norm, self.factor = norm, factor

    def forward(self, x):
        return self.norm(x) * self.factor

    def fold(self):
        self.factor = merge.factor_into_norm(self.norm, self.factor)


class ScaledTwice(Scene):
    """A factor and an offset, of which the last channels are scaled once more."""

    counts = {}

    def __init__(self):
        super().__init__()
        self.rows = slice(3, None)
        self.weight, self.bias = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8))
        self.scale = nn.Parameter(torch.empty(5))

    def forward(self, x):
        y = x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        if self.scale is None:
            return y
        return torch.cat((y[:, :3], y[:, 3:] * self.scale.view(-1, 1, 1)), 1)

    def fold(self):
        if self.scale is not None:
            merge.scale_parameter(self.weight, self.scale, self.rows)
            merge.scale_parameter(self.bias, self.scale, self.rows)
        self.scale = None


class ShiftedTwice(Scene):
    counts = {"offset into an offset": 1}

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8))

    def forward(self, x):
        y = x + self.first.view(-1, 1, 1)
        return y * 2 if self.second is None else y + (x + self.second.view(-1, 1, 1))

    def forward_sum(self, x):
        return x + x + self.first.view(-1, 1, 1)

    def fold(self):
        merge.shift_together(self.first, self.second)
        if self.second is not None:
            self.second = None
            self.forward = self.forward_sum


class Attention(Scene):
    """Softmax attention with two heads, on tokens or on maps, and a map after it."""

    counts = {
        "bias that softmax ignores": 1,
        "bias of attention values into the map after": 1,
    }

    def __init__(self, qkv, after, rows):
        super().__init__()
        self.qkv, self.after, self.rows = qkv, after, rows
        if isinstance(qkv, nn.Linear):
            self.shape = TOKENS

    def forward(self, x):
        y = self.qkv(x)
        if x.ndim == 4:
            y = y.flatten(2).mT
        q, k, v = (y[..., rows].unflatten(-1, (2, 4)).transpose(1, 2) for rows in self.rows)
        out = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.after(out.mT.unflatten(-1, x.shape[2:]) if x.ndim == 4 else out)

    def fold_keys(self):
        merge.drop_softmax_bias(self.qkv, self.rows[1])

    def fold_values(self):
        merge.uniform_bias_into_next(self.qkv, self.rows[2], self.after)

    def fold(self):
        self.fold_keys()
        self.fold_values()


class Parallel(Scene):
    counts = {"parallel branch into a kernel": 5, "identity into a kernel": 1}

    def __init__(self, biases=(True, False, True, False, True, False), identity=True):
        super().__init__()
        sizes = ((7, 1), (1, 1), (3, 1), (3, 2), (3, 3), (5, 1))
        self.identity = identity
        self.convs = nn.ModuleList(
            nn.Conv2d(8, 8, k, padding=k // 2 * d, dilation=d, groups=8, bias=bias)
            for (k, d), bias in zip(sizes, biases, strict=True)
        )

    def forward(self, x):
        y = sum(conv(x) for conv in self.convs)
        return y + x if self.identity else y

    def fold(self):
        merge.branches_into_kernel(self.convs[0], list(self.convs[1:]), self.identity)
        del self.convs[1:]
        self.identity = False


class PartlyPassed(Scene):
    counts = {"identity into a kernel": 1}

    def __init__(self, kernel_size=3, bias=True, dilation=1):
        super().__init__()
        sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        padding = tuple(k // 2 * dilation for k in sizes)
        self.kept = 3
        self.conv = nn.Conv2d(
            5, 5, kernel_size, padding=padding, dilation=dilation, groups=5, bias=bias
        )

    def forward(self, x):
        if not self.kept:
            return self.conv(x)
        return torch.cat((x[:, : self.kept], self.conv(x[:, self.kept :])), 1)

    def fold(self):
        if self.kept:
            self.conv, self.kept = merge.pass_outputs_into_kernel(self.conv, self.kept), 0


class Contrast(Scene):
    counts = {"contrast with the mean into maps": 1}

    def __init__(self, bias=True, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 1, groups=groups, bias=bias)
        self.gain = nn.Parameter(torch.empty(1, 6, 1, 1))
        self.mean = None

    def forward(self, x):
        y = self.conv(x)
        if self.mean is not None:
            return y + self.mean(x.mean((2, 3), keepdim=True))
        return y + self.gain * (y - y.mean((2, 3), keepdim=True))

    def fold(self):
        if self.gain is not None:
            self.mean = merge.split_contrast(self.conv, self.gain)
            self.gain = None


class SideBySide(Scene):
    counts = {"maps of one input into one map": 1}

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        if self.second is None:
            return self.first(x)
        return torch.cat((self.first(x), self.second(x)), 1)

    def fold(self):
        if self.second is not None:
            self.first, self.second = merge.stack_maps(self.first, self.second), None


class Averaged(Scene):
    counts = {"averaged maps": 1}
    shape = TOKENS

    def __init__(self, bias=True, other_bias=True):
        super().__init__()
        self.first = nn.Linear(8, 6, bias=bias)
        self.second = nn.Linear(8, 6, bias=other_bias)

    def forward(self, x):
        if self.second is None:
            return self.first(x)
        return (self.first(x) + self.second(x)) / 2

    def fold(self):
        if self.second is not None:
            merge.average_maps(self.first, self.second)
            self.second = None


class Rotated(Scene):
    counts = {"rotation into the map after": 1}

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.rotation = nn.Parameter(torch.empty(4, 2))

    def forward(self, x):
        return self.conv(x if self.rotation is None else complex_rotation(x, self.rotation))

    def fold(self):
        if self.rotation is not None:
            self.conv = merge.rotation_into_next(self.rotation, self.conv)
            self.rotation = None


THIRDS = tuple(slice(8 * i, 8 * i + 8) for i in range(3))
INTERLEAVED = tuple(torch.arange(24) % 3 == i for i in range(3))


def attention(kind, rows=THIRDS, bias=True):
    """On tokens, or on maps where the map after the attention is grouped and reaches further."""
    if kind == "linear":
        return Attention(nn.Linear(8, 24), nn.Linear(8, 6, bias=bias), rows)
    after = nn.Conv2d(8, 6, (2, 3), stride=2, groups=2, bias=bias)
    return Attention(nn.Conv2d(8, 24, 1), after, rows)


SCENES = {
    "norm_into_previous": lambda: NormAfterMap(a_map("padded_grouped", False)),
    "norm_into_previous_bias": lambda: NormAfterMap(a_map("same")),
    "batch_norm_into_next": lambda: NormBeforeMap(nn.BatchNorm2d(8), a_map("grouped", False)),
    "layer_norm_into_next": lambda: NormBeforeMap(LayerNorm2d(8), a_map("even_strided")),
    "group_norm_into_next": lambda: NormBeforeMap(nn.GroupNorm(4, 8), a_map("depthwise")),
    "center_outputs": lambda: Centered(a_map("padded")),
    "scale_into_previous": lambda: Scaled(a_map("padded"), slice(2, 5)),
    "shift_into_previous": lambda: Shifted(a_map("padded", False), slice(2, 5)),
    "shift_into_next": lambda: ShiftedInput(a_map("depthwise_multiplier", False)),
    "factor_into_outputs": lambda: Factor(a_map("padded"), torch.arange(6) % 2 == 0),
    "factor_into_norm": lambda: FactorAfterNorm(LayerNorm2d(8)),
    "scale_parameter": ScaledTwice,
    "shift_together": ShiftedTwice,
    "attention_linear": lambda: attention("linear", INTERLEAVED, bias=False),
    "attention_conv": lambda: attention("conv"),
    "branches_into_kernel": Parallel,
    "pass_outputs_into_kernel": PartlyPassed,
    "split_contrast": Contrast,
    "stack_maps": lambda: SideBySide(a_map("padded"), a_map("padded", out_channels=3)),
    "average_maps": Averaged,
    "rotation_into_next": lambda: Rotated(a_map("padded_grouped", out_channels=4)),
    "rotation_into_depthwise": lambda: Rotated(a_map("padded_depthwise", False)),
}
EVERY_SCENE = pytest.mark.parametrize("name", SCENES)


def assert_exact(scene, x=None):
    """The rule keeps the value, and a second time changes nothing. Returns the merged scene."""
    randomized(scene)
    if x is None:
        x = torch.randn(scene.shape, dtype=torch.float64)
    expected = value(scene, x)
    with merge.recorded() as counts:
        scene.fold()
    assert counts == scene.counts
    assert_same(value(scene, x), expected)
    once = snapshot(scene)
    scene.fold()
    twice = scene.state_dict()
    assert list(twice) == list(once)
    for name, tensor in once.items():
        assert torch.allclose(twice[name], tensor, rtol=0, atol=1e-14), name
    assert_same(value(scene, x), expected)
    assert all(p.requires_grad and p.is_leaf for p in scene.parameters())
    return scene


# What holds for all rules.


def test_every_public_rule_has_a_test_of_what_holds_for_all():
    no_rules = {"is_map", "record", "recorded", "fold_chain"}
    called = {"drop_softmax_bias", "uniform_bias_into_next", "norm_into_next"}  # under other names
    assert set(merge.__all__) - no_rules - called <= set(SCENES)


@EVERY_SCENE
def test_exact_and_idempotent(name):
    assert_exact(SCENES[name]())


@EVERY_SCENE
def test_narrow_types_stay_and_are_rounded_once(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scene = randomized(SCENES[name]()).to(dtype)
        wide = copy.deepcopy(scene).double()
        scene.fold()
        wide.fold()
        found, expected = scene.state_dict(), wide.state_dict()
        assert list(found) == list(expected)
        for key, tensor in found.items():
            assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.int64), key
            assert torch.equal(tensor, expected[key].to(tensor.dtype)), (key, dtype)


@EVERY_SCENE
def test_channels_last_weights_stay_so_and_give_the_same(name):
    scene = randomized(SCENES[name]())
    other = copy.deepcopy(scene).to(memory_format=torch.channels_last)
    old = [p for p in other.parameters() if p.ndim == 4]
    strides = [p.stride() for p in old]
    scene.fold()
    other.fold()
    assert [p.stride() for p in old] == strides
    expected = scene.state_dict()
    for key, tensor in other.state_dict().items():
        # Sums over channels run in another order.
        assert torch.allclose(tensor, expected[key], rtol=0, atol=1e-14), key


@EVERY_SCENE
def test_the_meta_device_gives_the_same_names_and_shapes(name):
    scene = randomized(SCENES[name]())
    other = copy.deepcopy(scene).to("meta")
    scene.fold()
    with merge.recorded() as counts:
        other.fold()
    assert counts == scene.counts
    found, expected = other.state_dict(), scene.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    assert all(tensor.is_meta for tensor in found.values())


@EVERY_SCENE
def test_frozen_parameters_stay_frozen_and_new_ones_follow_the_weight(name):
    scene = randomized(SCENES[name]()).requires_grad_(False)
    scene.fold()
    assert not any(p.requires_grad for p in scene.parameters())


@EVERY_SCENE
def test_new_maps_are_in_evaluation_mode(name):
    scene = randomized(SCENES[name]())
    scene.fold()
    modules = [m for m in scene.modules() if not isinstance(m, nn.Identity)]
    assert not any(module.training for module in modules)


def test_one_frozen_map_among_others_stays_frozen():
    scene = randomized(NormBeforeMap(nn.BatchNorm2d(8), a_map("odd", bias=False)))
    scene.linear.requires_grad_(False)
    scene.fold()
    assert not scene.linear.weight.requires_grad and not scene.linear.bias.requires_grad
    scene = randomized(NormBeforeMap(nn.BatchNorm2d(8), a_map("odd"))).requires_grad_(False)
    scene.linear.weight.requires_grad_(True)
    scene.fold()
    assert scene.linear.weight.requires_grad and not scene.linear.bias.requires_grad


def test_merged_maps_can_be_trained_further():
    scene = randomized(NormAfterMap(a_map("padded", bias=False)))
    scene.fold()
    scene(input_of(scene.linear)).square().sum().backward()
    assert scene.linear.weight.grad.abs().max() > 0 and scene.linear.bias.grad.abs().max() > 0


# Counting.


def test_recorded_counts_by_rule_and_nests():
    def scale(times):
        for _ in range(times):
            merge.scale_into_previous(nn.Linear(2, 2), torch.ones(2))

    with merge.recorded() as outer:
        scale(1)
        with merge.recorded() as inner:
            scale(2)
            merge.record("own")
        scale(3)
        merge.shift_into_previous(nn.Linear(2, 2), torch.ones(2))
    scale(1)
    merge.record("own")
    assert inner == {"layer scale into the map before": 2, "own": 1}
    assert outer == {"layer scale into the map before": 4, "offset into a bias": 1}


def test_recorded_ends_with_an_error_inside():
    with pytest.raises(KeyError), merge.recorded() as counts:
        raise KeyError
    merge.record("own")
    assert not counts


# What a map is.


class OwnConv(nn.Conv2d):
    pass


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("kind", EVERY_MAP)
def test_plain_convolutions_and_linear_layers_are_maps(kind):
    assert merge.is_map(a_map(kind))


NO_MAPS = {
    "own_conv": lambda: OwnConv(8, 8, 1),
    "own_linear": lambda: OwnLinear(8, 8),
    "timm_same": lambda: Conv2dSame(8, 8, 3, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 1),
    "conv1d": lambda: nn.Conv1d(8, 8, 1),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
    "sequential": lambda: nn.Sequential(nn.Conv2d(8, 8, 1)),
    "none": lambda: None,
}


@pytest.mark.parametrize("name", NO_MAPS)
def test_nothing_moves_into_what_is_no_plain_map(name):
    other = NO_MAPS[name]()
    norm = randomized(nn.BatchNorm2d(8))
    both = nn.ModuleList([norm, *([] if other is None else [other])])
    before = snapshot(both)
    assert not merge.is_map(other)
    with merge.recorded() as counts:
        assert merge.norm_into_previous(other, norm) is norm
        assert merge.norm_into_next(norm, other) is norm
        merge.uniform_bias_into_next(nn.Linear(8, 8), slice(None), other)
        with pytest.raises(ValueError, match="it is no unpadded map"):
            merge.shift_into_next(torch.ones(8), other)
    assert not counts
    assert_unchanged(both, before)


# Norms.


@BIAS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", EVERY_MAP)
def test_a_batch_norm_goes_into_the_map_before(kind, affine, bias):
    scene = NormAfterMap(a_map(kind, bias), affine=affine, eps=1e-3)
    assert type(assert_exact(scene, input_of(scene.linear)).norm) is nn.Identity


@BIAS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", EVERY_UNPADDED)
def test_a_batch_norm_goes_into_the_map_after(kind, affine, bias):
    norm = nn.BatchNorm1d if kind == "linear" else nn.BatchNorm2d
    scene = NormBeforeMap(norm(8, affine=affine, eps=1e-3), a_map(kind, bias))
    assert type(assert_exact(scene, input_of(scene.linear)).norm) is nn.Identity


NORMS = {
    "layer": lambda: LayerNorm2d(8),
    "layer_no_offset": lambda: LayerNorm2d(8, bias=False),
    "layer_no_factor": lambda: without(LayerNorm2d(8), "weight"),
    "group": lambda: nn.GroupNorm(2, 8),
    "group_no_factor": lambda: without(nn.GroupNorm(1, 8), "weight"),
    "group_no_offset": lambda: without(nn.GroupNorm(8, 8), "bias"),
}


def without(norm, name):
    setattr(norm, name, None)
    return norm


@BIAS
@pytest.mark.parametrize("kind", UNPADDED)
def test_factor_and_offset_of_a_norm_go_into_the_convolution_after(kind, bias):
    for make in NORMS.values():
        norm = make()
        assert assert_exact(NormBeforeMap(norm, a_map(kind, bias))).norm is norm
        assert norm.weight is None and norm.bias is None


@BIAS
@pytest.mark.parametrize("offset", [True, False])
def test_factor_and_offset_of_a_layer_norm_go_into_the_linear_layer_after(offset, bias):
    scene = NormBeforeMap(nn.LayerNorm(8, bias=offset), nn.Linear(8, 6, bias=bias))
    assert_exact(scene, torch.randn(TOKENS, dtype=torch.float64))


def test_a_norm_before_a_map_over_another_axis_stays():
    for norm in (nn.GroupNorm(2, 8), nn.BatchNorm2d(8), LayerNorm2d(8)):
        scene = randomized(NormBeforeMap(norm, nn.Linear(8, 6)))
        before = snapshot(scene)
        scene.fold()
        assert scene.norm is norm
        assert_unchanged(scene, before)


@pytest.mark.parametrize("kind", PADDED)
def test_a_norm_before_a_padded_convolution_stays(kind):
    for norm in (nn.BatchNorm2d(8), *(make() for make in NORMS.values())):
        scene = randomized(NormBeforeMap(norm, a_map(kind)))
        before = snapshot(scene)
        with merge.recorded() as counts:
            scene.fold()
        assert scene.norm is norm and not counts
        assert_unchanged(scene, before)


NO_AFFINE = [
    LayerNorm2d(8, affine=False),
    nn.LayerNorm(8, elementwise_affine=False),
    nn.GroupNorm(2, 8, affine=False),
    nn.InstanceNorm2d(8, affine=True),
    nn.ReLU(),
    nn.Identity(),
]


@pytest.mark.parametrize("other", NO_AFFINE, ids=lambda m: type(m).__name__)
def test_what_has_no_parameters_to_move_stays(other):
    conv = randomized(a_map("1x1"))
    before = snapshot(conv)
    with merge.recorded() as counts:
        assert merge.norm_into_next(other, conv) is other
        assert merge.norm_into_previous(conv, other) is other
    assert not counts
    assert_unchanged(conv, before)


@pytest.mark.parametrize("norm", [LayerNorm2d(6), nn.GroupNorm(2, 6)])
def test_statistics_of_the_input_do_not_go_into_the_map_before(norm):
    conv = randomized(a_map("1x1"))
    before = snapshot(conv)
    assert merge.norm_into_previous(conv, norm) is norm
    assert_unchanged(conv, before)


def test_a_batch_norm_without_running_statistics_is_refused():
    norm, linear = nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 8)
    with pytest.raises(ValueError, match="running statistics"):
        merge.norm_into_previous(linear, norm)
    with pytest.raises(ValueError, match="running statistics"):
        merge.norm_into_next(norm, linear)


@BIAS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [k for k, o in GEOMETRIES.items() if "groups" not in o])
def test_a_centered_norm_after_centered_outputs_is_the_layer_norm(kind, affine, bias):
    scene = assert_exact(Centered(a_map(kind, bias), affine=affine))
    y = value(scene.conv, torch.randn(MAP, dtype=torch.float64))
    assert y.mean(1).abs().max() < 1e-13 * y.abs().max()


# Factors and offsets.

ROWS = (slice(None), slice(2), slice(-2, None), slice(1, None, 2))


@BIAS
@pytest.mark.parametrize("kind", ["linear", "odd", "padded_grouped", "padded_multiplier", "same"])
def test_a_factor_per_channel_goes_into_the_outputs_before(kind, bias):
    for rows in ROWS:
        scene = Scaled(a_map(kind, bias), rows)
        assert_exact(scene, input_of(scene.linear))
        assert (scene.linear.bias is not None) == bias  # a factor needs no bias of its own


@BIAS
@pytest.mark.parametrize("kind", ["linear", "odd", "padded_grouped", "padded_multiplier", "same"])
def test_an_offset_goes_into_the_bias_before(kind, bias):
    for rows in ROWS:
        scene = Shifted(a_map(kind, bias), rows)
        weight = scene.linear.weight
        assert_exact(scene, input_of(scene.linear))
        assert scene.linear.weight is weight


@BIAS
@pytest.mark.parametrize("kind", EVERY_UNPADDED)
def test_an_offset_goes_into_the_map_after(kind, bias):
    scene = ShiftedInput(a_map(kind, bias))
    assert_exact(scene, input_of(scene.linear))


@pytest.mark.parametrize("kind", PADDED)
def test_an_offset_before_a_padded_convolution_is_refused(kind):
    conv = randomized(a_map(kind))
    before = snapshot(conv)
    with pytest.raises(ValueError, match="it is no unpadded map"):
        merge.shift_into_next(torch.ones(8), conv)
    assert_unchanged(conv, before)
    merge.shift_into_next(None, conv)  # nothing to move


@pytest.mark.parametrize("shape", [(6,), (6, 1, 1), (1, 6, 1, 1)])
def test_factors_and_offsets_may_have_the_shape_in_which_they_are_applied(shape):
    conv, x = randomized(a_map("padded")), torch.randn(MAP, dtype=torch.float64)
    scale, shift = torch.randn(2, *shape, dtype=torch.float64)
    expected = value(conv, x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    merge.scale_into_previous(conv, scale)
    merge.shift_into_previous(conv, shift)
    assert_same(value(conv, x), expected)


def test_offsets_before_a_map_may_have_the_shape_in_which_they_are_applied():
    conv, x = randomized(a_map("grouped")), torch.randn(MAP, dtype=torch.float64)
    shift = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    expected = value(conv, x + shift)
    merge.shift_into_next(shift, conv)
    assert_same(value(conv, x), expected)


def test_nothing_given_is_nothing_done():
    linear = randomized(nn.Linear(8, 8))
    norm = randomized(nn.LayerNorm(8))
    before, norm_before = snapshot(linear), snapshot(norm)
    offset = torch.ones(8)
    with merge.recorded() as counts:
        merge.scale_into_previous(linear, None)
        merge.shift_into_previous(linear, None)
        merge.shift_into_next(None, linear)
        merge.shift_together(offset, None)
        merge.shift_together(None, offset)
        assert merge.factor_into_outputs(linear, 1.0) == 1.0
        assert merge.factor_into_norm(norm, 1.0) == 1.0
    assert not counts
    assert torch.equal(offset, torch.ones(8))
    assert_unchanged(linear, before)
    assert_unchanged(norm, norm_before)


@BIAS
@pytest.mark.parametrize("rows", ["slice", "mask", "no_rows", "all"])
@pytest.mark.parametrize("kind", ["linear", "padded_grouped", "even_strided"])
def test_a_constant_factor_goes_into_rows_of_the_map_before(kind, rows, bias):
    chosen = {
        "slice": slice(1, 4),
        "mask": torch.tensor([True, False, False, True, True, False]),
        "no_rows": torch.zeros(6, dtype=torch.bool),
        "all": slice(None),
    }[rows]
    for factor in (-2.5, 0.0, 1e-3):
        scene = Factor(a_map(kind, bias), chosen, factor)
        assert_exact(scene, input_of(scene.linear))
        assert scene.factor == 1.0
        assert (scene.linear.bias is not None) == bias


@pytest.mark.parametrize("factor", [-2.5, 0.0, 1e-3])
@pytest.mark.parametrize("norm", [LayerNorm2d, nn.LayerNorm])
def test_a_constant_factor_goes_into_the_norm_before(norm, factor):
    scene = FactorAfterNorm(norm(8), factor)
    assert_exact(scene, torch.randn(MAP if norm is LayerNorm2d else TOKENS, dtype=torch.float64))
    assert scene.factor == 1.0


def test_a_factor_goes_into_entries_of_a_parameter():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16))
    merge.scale_parameter(parameter, torch.tensor([0.0, -1.5]), slice(1, 3))
    assert parameter.tolist() == [1, 0, -4.5, 4]
    merge.scale_parameter(parameter, torch.full((4,), 2.0))
    assert parameter.tolist() == [2, 0, -9, 8]
    assert parameter.dtype == torch.bfloat16 and parameter.requires_grad


def test_one_offset_takes_the_other_and_leaves_it():
    offset, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor([1.0, 0.0, -3.0]))
    merge.shift_together(offset, other)
    assert offset.tolist() == [2, 1, -2] and other.tolist() == [1, 0, -3]


# Attention.


@BIAS
@pytest.mark.parametrize("rows", [THIRDS, INTERLEAVED], ids=["slices", "masks"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_biases_of_keys_and_values_leave_a_softmax_attention(kind, rows, bias):
    scene = assert_exact(attention(kind, rows, bias))
    left, (q, k, v) = scene.qkv.bias.detach(), rows
    assert left[q].abs().max() > 0
    assert not left[k].any() and not left[v].any()


@pytest.mark.parametrize("rows", [THIRDS, INTERLEAVED], ids=["slices", "masks"])
@pytest.mark.parametrize("part", ["fold_keys", "fold_values"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_each_bias_of_an_attention_moves_alone(kind, part, rows):
    scene = randomized(attention(kind, rows))
    x = torch.randn(scene.shape, dtype=torch.float64)
    expected, before = value(scene, x), snapshot(scene)
    getattr(scene, part)()
    assert_same(value(scene, x), expected)
    changed = {
        name for name, tensor in scene.state_dict().items() if (tensor != before[name]).any()
    }
    assert changed == {"qkv.bias"} | ({"after.bias"} if part == "fold_values" else set())


def test_biases_of_an_attention_that_are_zero_or_missing_are_left():
    scene = randomized(attention("linear", bias=False))
    scene.qkv.bias.data[8:] = 0
    bare = Attention(nn.Linear(8, 24, bias=False), nn.Linear(8, 6, bias=False), THIRDS)
    for each in (scene, bare):
        before = snapshot(each)
        with merge.recorded() as counts:
            each.fold()
        assert not counts
        assert_unchanged(each, before)


@pytest.mark.parametrize("kind", PADDED)
def test_the_bias_of_values_stays_before_a_padded_convolution(kind):
    scene = randomized(Attention(nn.Conv2d(8, 24, 1), a_map(kind), THIRDS))
    before = snapshot(scene)
    with merge.recorded() as counts:
        scene.fold_values()
    assert not counts
    assert_unchanged(scene, before)


# Maps side by side.

SOME = (True, False, True, False, True, False)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("biases", [(True,) * 6, (False,) * 6, SOME, tuple(not b for b in SOME)])
def test_parallel_depthwise_kernels_become_one(biases, identity):
    scene = Parallel(biases, identity)
    counts = dict(Parallel.counts)
    scene.counts = counts if identity else {"parallel branch into a kernel": 5}
    # The second fold has one convolution and no identity: nothing to add.
    assert_exact(scene)
    assert (scene.convs[0].bias is not None) == any(biases)


@BIAS
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_identity_alone_goes_into_a_kernel(kernel_size, bias):
    conv = randomized(nn.Conv2d(8, 8, kernel_size, padding=kernel_size // 2, groups=8, bias=bias))
    x = torch.randn(MAP, dtype=torch.float64)
    expected = value(conv, x) + x
    merge.branches_into_kernel(conv, identity=True)
    assert_same(value(conv, x), expected)
    assert (conv.bias is not None) == bias


@BIAS
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), ((1, 5), 1), ((7, 3), 2)])
def test_channels_that_pass_go_into_a_kernel(kernel_size, dilation, bias):
    scene = assert_exact(PartlyPassed(kernel_size, bias, dilation))
    assert (scene.conv.bias is not None) == bias
    assert scene.conv.groups == scene.conv.in_channels == scene.conv.out_channels == 8


@BIAS
@pytest.mark.parametrize("groups", [1, 2])
def test_contrast_with_the_mean_becomes_two_maps(groups, bias):
    scene = assert_exact(Contrast(bias, groups))
    assert (scene.conv.bias is not None) == bias and scene.mean.bias is None


@pytest.mark.parametrize("kind", [k for k, o in GEOMETRIES.items() if "groups" not in o])
def test_maps_of_one_input_become_one(kind):
    for bias, other_bias in product([True, False], repeat=2):
        first, second = a_map(kind, bias), a_map(kind, other_bias, out_channels=3)
        both = assert_exact(SideBySide(first, second)).first
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels"):
            assert getattr(both, name) == getattr(first, name), name
        assert both.out_channels == 9


@pytest.mark.parametrize(("bias", "other_bias"), product([True, False], repeat=2))
def test_the_mean_of_two_linear_maps_is_one(bias, other_bias):
    assert_exact(Averaged(bias, other_bias))


# (kind, outputs, groups after)
ROTATED = [
    ("1x1", 6, 1),
    ("even_strided", 6, 1),
    ("same", 6, 1),
    ("padded_grouped", 4, 2),
    ("same_even", 12, 4),
    ("depthwise", 8, 4),
    ("valid_dilated", 6, 2),
    ("padded_depthwise", 8, 4),
]


@BIAS
@pytest.mark.parametrize(("kind", "outputs", "groups"), ROTATED)
def test_a_complex_rotation_goes_into_the_convolution_after(kind, outputs, groups, bias):
    old = a_map(kind, bias, out_channels=outputs)
    conv = assert_exact(Rotated(old)).conv
    assert conv.groups == groups and (conv.bias is not None) == bias
    for name in ("kernel_size", "stride", "padding", "dilation", "in_channels", "out_channels"):
        assert getattr(conv, name) == getattr(old, name), name


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_a_rotation_goes_into_channels_last_weights(groups):
    scene = randomized(Rotated(a_map("padded", out_channels=8, groups=groups)))
    assert_exact(scene.to(memory_format=torch.channels_last))


# Chains.


def fold(chain, shape=MAP):
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


BEFORE, AFTER = "norm into the map before", "norm into the map after"


def conv(kind="padded", bias=False):
    return a_map(kind, bias, out_channels=8)


def kinds(chain):
    return [type(module) for module in chain]


def test_a_batch_norm_goes_into_an_unpadded_map_after_it_and_spares_a_bias():
    chain = nn.Sequential(conv(), nn.BatchNorm2d(8), conv("1x1"))
    assert fold(chain) == {AFTER: 1}
    assert kinds(chain) == [nn.Conv2d, nn.Identity, nn.Conv2d]
    assert chain[0].bias is None and chain[2].bias is not None


@pytest.mark.parametrize("after", [conv(), nn.ReLU(), Conv2dSame(8, 8, 3), None])
def test_a_batch_norm_goes_into_the_map_before_where_it_cannot_go_on(after):
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
    """Ends with a map and begins with one, but does more."""

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


def test_each_norm_of_a_long_chain_finds_its_map():
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
    x = torch.randn(MAP, dtype=torch.float64)
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
    assert fold(chain) == {"constant factor into the map before": 1, BEFORE: 1}
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


# Where a rule does not hold it has to refuse or do nothing. Today it changes the value.


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


REFUSED = {
    "center_grouped": lambda: Centered(a_map("grouped")),
    "center_depthwise": lambda: Centered(a_map("padded_depthwise")),
    "stack_grouped": lambda: SideBySide(a_map("grouped"), a_map("grouped")),
    "rotation_into_a_multiplier": lambda: Rotated(a_map("padded_multiplier")),
    "padding_mode_of_a_new_map": reflecting,
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


@pytest.mark.parametrize("name", ["stack_maps", "rotation_into_next"])
def test_new_maps_take_the_memory_layout_of_the_old(name):
    scene = randomized(SCENES[name]()).to(memory_format=torch.channels_last)
    scene.fold()
    weights = [p for p in scene.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
