"""One small module for each rule of the merge algebra; `fold` applies it as a layer would."""

from __future__ import annotations

import pytest
import torch
from merge_layers import (
    FEATURE_MAP,
    TOKENS,
    assert_same,
    by_channel,
    linear_layer,
    on_rows,
    randomized,
    snapshot,
    value,
    width,
)
from timm.layers import LayerNorm2d, RmsNorm2d
from torch import nn

from backbones import merge
from backbones.families.unireplknet import CenteredNorm2d


def complex_rotation(x, rotation):
    """Multiply channels (2k, 2k + 1) as complex numbers."""
    turn = torch.complex(rotation[:, 0], rotation[:, 1]).view(-1, 1, 1)
    turned = torch.complex(x[:, 0::2].contiguous(), x[:, 1::2].contiguous()) * turn
    return torch.stack((turned.real, turned.imag), 2).flatten(1, 2)


class Scene(nn.Module):
    shape = FEATURE_MAP
    counts: dict[str, int]

    def fold(self):
        raise NotImplementedError


class NormAfterLayer(Scene):
    counts = {"norm into the linear layer before": 1}

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


class NormBeforeLayer(Scene):
    counts = {"norm into the linear layer after": 1}

    def __init__(self, norm, linear):
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x):
        if isinstance(self.norm, nn.BatchNorm1d):
            return self.linear(self.norm(x.mT).mT)
        return self.linear(self.norm(x))

    def fold(self):
        self.norm = merge.norm_into_next(self.norm, self.linear)


class NormBeforeLayers(Scene):
    """Two layers read the norm, one of them its average over positions."""

    counts = {"norm into the linear layer after": 1}

    def __init__(self, norm):
        super().__init__()
        self.norm, self.first = norm, nn.Conv2d(8, 6, 1, bias=False)
        self.other = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        x = self.norm(x)
        return self.first(x) * self.other(x.mean((2, 3), keepdim=True)).tanh()

    def fold(self):
        self.norm = merge.norm_into_next(self.norm, self.first, self.other)


class Centered(Scene):
    counts = {"mean of a layer norm into the linear layer before": 1}

    def __init__(self, conv, **options):
        super().__init__()
        self.conv, self.norm = conv, LayerNorm2d(width(conv), **options)

    def forward(self, x):
        return self.norm(self.conv(x))

    def fold(self):
        merge.center_outputs(self.conv)
        self.norm = CenteredNorm2d(self.norm)


class Scaled(Scene):
    counts = {"layer scale into the linear layer before": 1}

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
    counts = {"constant factor into the linear layer before": 1}

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
    """Softmax attention with two heads, on tokens or on feature maps, and a layer after it."""

    counts = {
        "bias that softmax ignores": 1,
        "bias of attention values into the linear layer after": 1,
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


class NormedConstant(Scene):
    counts = {"norm of a constant": 1}
    shape = TOKENS

    def __init__(self, **options):
        super().__init__()
        self.vectors, self.norm = nn.Parameter(torch.empty(3, 8)), nn.LayerNorm(8, **options)

    def forward(self, x):
        return x @ self.norm(self.vectors).mT

    def fold(self):
        if isinstance(self.norm, nn.LayerNorm):
            self.vectors = merge.norm_of_constant(self.norm, self.vectors)
            self.norm = nn.Identity()


class ConstantQuery(Scene):
    """Queries of the input's tokens by vectors that no input changes."""

    counts = {"constant query into the linear layer of keys": 1}
    shape = TOKENS

    def __init__(self, bias=True):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(3, 8))
        self.q, self.k = nn.Linear(8, 6, bias=bias), nn.Linear(8, 6)

    def forward(self, x):
        return (self.q(self.vectors) @ self.k(x).mT).softmax(-1) @ x

    def fold(self):
        if isinstance(self.q, nn.Linear):
            self.vectors = merge.constant_query_into_keys(self.vectors, self.q, self.k)
            self.q = self.k = nn.Identity()


class AveragedBetween(Scene):
    """Two linear layers with an average over tokens between them."""

    counts = {"linear layer into the linear layer after": 1}
    shape = TOKENS

    def __init__(self, bias=True, last_bias=True):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=bias)
        self.second = nn.Linear(8, 6, bias=last_bias)

    def forward(self, x):
        weights = x.sum(-1, keepdim=True).softmax(-2)
        return self.second((weights * self.first(x)).sum(-2))

    def fold(self):
        if isinstance(self.first, nn.Linear):
            merge.linear_into_next(self.first, self.second)
            self.first = nn.Identity()


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
        self.passed = 3
        self.conv = nn.Conv2d(
            5, 5, kernel_size, padding=padding, dilation=dilation, groups=5, bias=bias
        )

    def forward(self, x):
        if not self.passed:
            return self.conv(x)
        return torch.cat((x[:, : self.passed], self.conv(x[:, self.passed :])), 1)

    def fold(self):
        if self.passed:
            self.conv, self.passed = merge.pass_outputs_into_kernel(self.conv, self.passed), 0


class Contrast(Scene):
    counts = {"contrast with the mean into linear layers": 1}

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


class ContrastWithMap(Scene):
    counts = {"contrast with a map into the linear layer after": 1}

    def __init__(self, bias=True):
        super().__init__()
        self.first = nn.Conv2d(8, 1, 1)
        self.conv = nn.Conv2d(8, 6, 1, bias=bias)
        self.gain = nn.Parameter(torch.empty(8))
        self.direction = None

    def forward(self, x):
        d = self.first(x).tanh()
        if self.direction is not None:
            return self.conv(x) + by_channel(self.direction, self.conv) * d
        return self.conv(x + by_channel(self.gain, self.conv) * (x - d))

    def fold(self):
        if self.gain is not None:
            self.direction = merge.contrast_into_next(self.gain, self.conv)
            self.gain = None


class NormBeforePooling(Scene):
    counts = {"norm of a feature map into the linear layers after": 1}

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.pooled, self.places = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = self.norm(x)
        return self.pooled(x.mean((2, 3))) + self.places(x.flatten(2).mT).amax(1)

    def fold(self):
        self.norm = merge.map_norm_into_next(self.norm, (self.pooled, self.places))


class NormedShortcut(Scene):
    counts = {"norm on a shortcut into a factor": 1}

    def __init__(self, **options):
        super().__init__()
        self.norm = nn.BatchNorm2d(8, **options)
        self.gain = nn.Parameter(torch.empty(8))
        self.branch = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.factor = None

    def forward(self, x):
        if self.factor is not None:
            return by_channel(self.factor, self.branch) * x + self.branch(x)
        return x + by_channel(self.gain, self.branch) * self.norm(x) + self.branch(x)

    def fold(self):
        if self.factor is None:
            self.factor = merge.norm_into_shortcut(self.norm, self.gain, self.branch)
            self.norm, self.gain = nn.Identity(), None


class BiasesSideBySide(Scene):
    counts = {"biases into the linear layer after": 1}

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.after = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x):
        kept, rest = self.first(x).split((3, 5), 1)
        return self.after(torch.cat((kept, self.other(rest)), 1))

    def fold(self):
        merge.biases_into_next(self.first, slice(3), [self.other], self.after)


class LessMean(Scene):
    counts = {
        "mean of outputs into the linear layer before": 1,
        "function of a parameter into a parameter": 1,
    }
    shape = TOKENS

    def __init__(self, bias=True):
        super().__init__()
        self.linear = nn.Linear(8, 6, bias=bias)
        self.share = nn.Parameter(torch.empty(5, 1))

    def forward(self, x):
        y = self.linear(x)
        if self.linear.out_features == 6:
            return y - self.share.sigmoid() * y.mean(-1, keepdim=True)
        return y[..., :6] - self.share * y[..., 6:]

    def fold(self):
        if self.linear.out_features == 6:
            self.linear = merge.mean_as_output(self.linear)
            self.share = merge.function_into_parameter(self.share, torch.sigmoid)


class Activated(Scene):
    """A factor that is a function of a parameter."""

    counts = {"function of a parameter into a parameter": 1}

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.empty(8, 1, 1))
        self.factor = None

    def forward(self, x):
        return x * (self.raw.exp() if self.factor is None else self.factor)

    def fold(self):
        if self.factor is None:
            self.factor = merge.function_into_parameter(self.raw, torch.exp)
            self.raw = None


class OneAfterTheOther(Scene):
    """A layer that reads the input beside what another makes of it."""

    counts = {"linear layer into the linear layer after": 1}

    def __init__(self, first, after):
        super().__init__()
        self.first, self.after = first, after

    def forward(self, x):
        return self.after(torch.cat((x, self.first(x)), 1))

    def fold(self):
        if not isinstance(self.first, nn.Identity):
            self.first = merge.linear_into_next(self.first, self.after, slice(8, None))


class SideBySide(Scene):
    counts = {"linear layers of one input into one": 1}

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        if isinstance(first, nn.Linear):
            self.shape = TOKENS

    def forward(self, x):
        if self.second is None:
            return self.first(x)
        axis = -1 if isinstance(self.first, nn.Linear) else 1
        return torch.cat((self.first(x), self.second(x)), axis)

    def fold(self):
        if self.second is not None:
            self.first, self.second = merge.stack_linear_layers(self.first, self.second), None


class SumOfShares(Scene):
    counts = {"sum of linear layers into one": 1}

    def __init__(self, *biases):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width, 6, 1, bias=bias) for width, bias in zip((3, 4, 1), biases, strict=True)
        )

    def forward(self, x):
        if len(self.convs) == 1:
            return self.convs[0](x)
        shares = zip(self.convs, x.split((3, 4, 1), 1), (0.5, -2, 3), strict=True)
        return sum(conv(factor * share) for conv, share, factor in shares)

    def fold(self):
        if len(self.convs) > 1:
            whole = merge.sum_linear_layers([*self.convs], (0.5, -2, 3))
            self.convs = nn.ModuleList([whole]).train(self.training)


class Averaged(Scene):
    counts = {"averaged linear layers": 1}
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
            merge.average_linear_layers(self.first, self.second)
            self.second = None


class Directions(Scene):
    """Positions compared by cosine with vectors, one of which is zero."""

    counts = {"factor into directions": 1}

    def __init__(self):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(1, 5, 8))
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, x):
        vectors = self.vectors
        if self.scale is not None:
            present = torch.arange(5).view(-1, 1) > 0
            vectors = nn.functional.normalize(vectors * present, dim=-1) * self.scale
        return (vectors @ x.flatten(2)).unflatten(2, x.shape[2:])

    def fold(self):
        if self.scale is not None:
            with torch.no_grad():
                self.vectors[:, 0] = 0
            merge.scale_into_directions(self.vectors, self.scale)
            self.scale = None


class Rotated(Scene):
    counts = {"rotation into the linear layer after": 1}

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
    """On tokens, or on feature maps where the layer after it is grouped and reaches further."""
    if kind == "linear":
        return Attention(nn.Linear(8, 24), nn.Linear(8, 6, bias=bias), rows)
    after = nn.Conv2d(8, 6, (2, 3), stride=2, groups=2, bias=bias)
    return Attention(nn.Conv2d(8, 24, 1), after, rows)


SCENES = {
    "norm_into_previous": lambda: NormAfterLayer(linear_layer("padded_grouped", False)),
    "norm_into_previous_bias": lambda: NormAfterLayer(linear_layer("same")),
    "batch_norm_into_next": lambda: NormBeforeLayer(
        nn.BatchNorm2d(8), linear_layer("grouped", False)
    ),
    "layer_norm_into_next": lambda: NormBeforeLayer(LayerNorm2d(8), linear_layer("even_strided")),
    "group_norm_into_next": lambda: NormBeforeLayer(nn.GroupNorm(4, 8), linear_layer("depthwise")),
    "rms_norm_into_next": lambda: NormBeforeLayer(RmsNorm2d(8), linear_layer("grouped", False)),
    "layer_norm_into_two": lambda: NormBeforeLayers(LayerNorm2d(8)),
    "center_outputs": lambda: Centered(linear_layer("padded")),
    "scale_into_previous": lambda: Scaled(linear_layer("padded"), slice(2, 5)),
    "shift_into_previous": lambda: Shifted(linear_layer("padded", False), slice(2, 5)),
    "shift_into_next": lambda: ShiftedInput(linear_layer("depthwise_multiplier", False)),
    "factor_into_outputs": lambda: Factor(linear_layer("padded"), torch.arange(6) % 2 == 0),
    "factor_into_norm": lambda: FactorAfterNorm(LayerNorm2d(8)),
    "scale_into_directions": Directions,
    "scale_parameter": ScaledTwice,
    "shift_together": ShiftedTwice,
    "attention_linear": lambda: attention("linear", INTERLEAVED, bias=False),
    "attention_conv": lambda: attention("conv"),
    "constant_query_into_keys": ConstantQuery,
    "constant_query_without_bias_into_keys": lambda: ConstantQuery(bias=False),
    "norm_of_constant": NormedConstant,
    "norm_of_constant_without_offset": lambda: NormedConstant(bias=False),
    "norm_of_constant_without_parameters": lambda: NormedConstant(elementwise_affine=False),
    "linear_into_next_beyond_an_average": AveragedBetween,
    "linear_into_next_beyond_an_average_without_bias": lambda: AveragedBetween(
        bias=False, last_bias=False
    ),
    "branches_into_kernel": Parallel,
    "pass_outputs_into_kernel": PartlyPassed,
    "split_contrast": Contrast,
    "contrast_into_next": ContrastWithMap,
    "map_norm_into_next": lambda: NormBeforePooling(nn.BatchNorm2d(8)),
    "map_norm_without_parameters_into_next": lambda: NormBeforePooling(
        nn.BatchNorm2d(8, affine=False)
    ),
    "map_group_norm_into_next": lambda: NormBeforePooling(nn.GroupNorm(1, 8)),
    "map_layer_norm_into_next": lambda: NormBeforePooling(LayerNorm2d(8)),
    "function_into_parameter": Activated,
    "linear_into_next": lambda: OneAfterTheOther(
        nn.Conv2d(8, 8, 1), nn.Conv2d(16, 5, 1, bias=False)
    ),
    "linear_without_bias_into_next": lambda: OneAfterTheOther(
        nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(16, 5, 1)
    ),
    "norm_into_shortcut": NormedShortcut,
    "norm_without_parameters_into_shortcut": lambda: NormedShortcut(affine=False),
    "biases_into_next": BiasesSideBySide,
    "mean_as_output": LessMean,
    "mean_as_output_without_bias": lambda: LessMean(bias=False),
    "sum_linear_layers": lambda: SumOfShares(True, True, True),
    "sum_linear_layers_one_bias": lambda: SumOfShares(False, False, True),
    "stack_linear_layers": lambda: SideBySide(
        linear_layer("padded"), linear_layer("padded", out_channels=3)
    ),
    "stack_linear_layers_of_tokens": lambda: SideBySide(
        nn.Linear(8, 6), nn.Linear(8, 3, bias=False)
    ),
    "average_linear_layers": Averaged,
    "rotation_into_next": lambda: Rotated(linear_layer("padded_grouped", out_channels=4)),
    "rotation_into_depthwise": lambda: Rotated(linear_layer("padded_depthwise", False)),
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
