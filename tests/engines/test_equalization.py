"""Scales of channels for int8: to the bit the same function, whose values fit one range better."""

import copy

import pytest
import torch
from damping import damp
from randomized import randomize
from tiers import shallow, smallest_of_each_family, smallest_size
from torch import nn
from torch.nn import functional as F

import backbones
from backbones.engines import export, open_exported
from backbones.engines.formats import Conversion
from backbones.engines.quantization import equalized
from backbones.errors import EquivalenceError

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def after(model, images=IMAGES, differing=0.0):
    """Return the copy with scales, and the names of the tensors that differ."""
    model.eval()
    before = copy.deepcopy(model.state_dict())
    found = equalized(Conversion(model, images[:2], calibration=images, precision="int8")).model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        torch.testing.assert_close(found(images), model(images), rtol=differing, atol=differing)
    state = found.state_dict()
    return found, {
        name for name in state if name not in before or not torch.equal(state[name], before[name])
    }


def uneven(layer, channel=1, by=300.0):
    """Make one channel of a layer's output as much larger."""
    with torch.no_grad():
        for numbers in layer.parameters():
            numbers[channel] *= by
    return layer


def shifted(norm):
    nn.init.ones_(norm.bias)
    return norm


class Block(nn.Module):
    """Layers `a` to `d`, put together by `how`."""

    def __init__(self, how, **layers):
        super().__init__()
        self.how = how
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.how(self, x).mean((2, 3)) if x.dim() == 4 else self.how(self, x)


def conv(inputs, outputs, kernel=1, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_every_family_computes_the_same_to_the_bit(name):
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=7, **shallow(name, 1)).eval()
    damp(randomize(model), name)
    merged = backbones.reparameterize(model)
    size = max(64, smallest_size(model))
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    conversion = Conversion(merged, images[:2], calibration=images, precision="int8")
    found = equalized(conversion).model
    with torch.no_grad():
        torch.testing.assert_close(found(images), merged(images), rtol=1e-6, atol=1e-6)
    assert [*found.state_dict()] != [] and found is not merged


@pytest.mark.parametrize(
    ("how", "layers", "changed"),
    [
        (lambda m, x: m.b(F.relu(m.a(x))), {}, {"a.weight", "a.bias", "b.weight"}),
        (lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1))), {}, {"a.weight", "a.bias", "b.weight"}),
        (
            lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 2)),
            {},
            {"a.weight", "a.bias", "b.weight"},
        ),
        (lambda m, x: m.b(F.gelu(m.a(x))), {}, set()),
        (lambda m, x: m.b(m.a(x)) + m.a(x).mean(), {}, set()),
        (
            lambda m, x: m.b(m.a(x) * torch.sigmoid(m.c(x))),
            {"c": conv(3, 4)},
            {"a.weight", "a.bias", "b.weight"},
        ),
        (
            lambda m, x: m.b(m.a(x) + m.c(x)),
            {"c": conv(3, 4)},
            {"a.weight", "a.bias", "c.weight", "c.bias", "b.weight"},
        ),
        (
            lambda m, x: (y := m.a(x)) is not None and m.b(y) + m.c(y),
            {"c": conv(4, 5)},
            {"a.weight", "a.bias", "b.weight", "c.weight"},
        ),
        (
            lambda m, x: m.b(m.n(m.c(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            {"c": conv(3, 4), "n": uneven(shifted(nn.LayerNorm(4)))},
            {"n.weight", "n.bias", "b.weight"},
        ),
    ],
    ids="relu pad pool gelu shared gate sum two-readers norm".split(),
)
def test_what_makes_a_channel_alone_is_scaled(how, layers, changed):
    torch.manual_seed(0)
    block = Block(how, a=uneven(conv(3, 4)), b=conv(4, 5), **copy.deepcopy(layers))
    assert after(block)[1] == changed


def test_channels_that_stay_set_the_measure_of_the_others():
    torch.manual_seed(0)
    block = Block(
        lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=uneven(conv(3, 4), 0, 0.001), b=conv(7, 5)
    )
    found, changed = after(block)
    assert changed == {"a.weight", "a.bias", "b.weight"}
    assert torch.equal(found.b.weight[:, :3], block.b.weight[:, :3])
    assert (found.b.weight[:, 3] / block.b.weight[:, 3] < 0.1).all()


def test_a_norm_that_lost_its_weights_gets_some():
    torch.manual_seed(0)
    scaled = conv(4, 5)
    with torch.no_grad():
        scaled.weight[:, 1] *= 100
    block = Block(
        lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 4), b=scaled, n=nn.GroupNorm(1, 4, affine=False)
    )
    found, changed = after(block, differing=1e-5)  # another kernel, which multiplies by weights
    assert changed == {"n.weight", "b.weight"}
    assert found.n.weight[1] > found.n.weight[0]


def test_channels_that_are_padded_stay():
    torch.manual_seed(0)
    block = Block(
        lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 0, 2))), a=uneven(conv(3, 4)), b=conv(6, 5)
    )
    assert after(block)[1] == set()


def test_depthwise_and_grouped_columns():
    torch.manual_seed(0)
    block = Block(
        lambda m, x: m.c(m.b(m.a(x))),
        a=uneven(conv(3, 4)),
        b=conv(4, 4, 3, padding=1, groups=4),
        c=conv(4, 6, groups=2),
    )
    assert after(block)[1] == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}


def test_tied_weights_and_dead_channels_stay():
    torch.manual_seed(0)
    tied = Block(lambda m, x: m.b(F.relu(m.a(x))) + m.c(x), a=uneven(conv(3, 3)), b=conv(3, 3))
    tied.c = conv(3, 3)
    tied.c.weight = tied.a.weight
    assert after(tied)[1] == set()
    dead = Block(lambda m, x: m.b(F.relu(m.a(x))), a=uneven(conv(3, 4)), b=conv(4, 5))
    nn.init.zeros_(dead.a.weight[2:3].detach())
    with torch.no_grad():
        dead.a.bias[2] = -1
    found, _ = after(dead)
    assert torch.isfinite(torch.cat([p.flatten() for p in found.parameters()])).all()
    assert torch.equal(found.b.weight[:, 2], dead.b.weight[:, 2])


def test_a_file_errs_less(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    block = Block(lambda m, x: m.b(F.relu(m.a(x))), a=uneven(conv(3, 16)), b=conv(16, 10)).eval()
    with torch.no_grad():
        block.b.weight[:, 1] /= 300
    options = {"input_size": (3, 8, 8), "precision": "int8", "calibration": IMAGES, "agreement": 0}

    def error():
        export(block, tmp_path / "m.onnx", **options)
        with torch.no_grad():
            return float((open_exported(tmp_path / "m.onnx")(IMAGES) - block(IMAGES)).std())

    scaled = error()
    monkeypatch.setattr("backbones.engines.exporting.equalized", lambda conversion: conversion)
    assert scaled < error() / 5


def test_another_function_is_refused(monkeypatch):
    def wrong(junction, scales, model):
        next(model.parameters()).mul_(2)

    monkeypatch.setattr("backbones.engines.quantization.equalization._apply", wrong)
    block = Block(lambda m, x: m.b(F.relu(m.a(x))), a=uneven(conv(3, 4)), b=conv(4, 5))
    with pytest.raises(EquivalenceError, match="changed what the model computes"):
        after(block)
