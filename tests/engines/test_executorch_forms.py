"""The forms for XNNPACK compute what the modules compute, and leave it little to pass on."""

import pytest
import torch
from randomized import randomize
from tiers import families_by_default, shallow
from timm.layers import GroupNorm1, LayerNorm2d
from torch import nn

import backbones
from backbones.engines import export
from backbones.engines.executorch.forms import (
    DecomposedGroupNorm,
    DecomposedNorm,
    DecomposedResponseNorm,
    for_xnnpack,
)
from backbones.layers import GlobalResponseNorm


class Unequal(nn.Module):
    """Two unequal parts of a map, multiplied."""

    def forward(self, x):
        first, second = x.split([1, 3], dim=1)
        return (first * second).flatten(1)


class Chosen(nn.Module):
    """One channel of a map, without its axis."""

    def forward(self, x):
        return (x[:, -1] * x[:, 1]).flatten(1)


class Masked(nn.Module):
    """A map without its border, by a mask of places."""

    def forward(self, x):
        places = torch.arange(x.shape[3], device=x.device)
        return (x * ((places > 0) & (places < 7)).to(x.dtype)).flatten(1)


class Product(nn.Module):
    """One product of two matrices, and attention."""

    def forward(self, x):
        x = x.flatten(2)
        return nn.functional.scaled_dot_product_attention(x, x, x).squeeze(1) @ x.transpose(1, 2)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", [*families_by_default(), "convnextv2_atto", "hornet_tiny_gf"])
def test_the_function_stays_the_same(name):
    model = backbones.create_model(
        name, num_classes=4, dtype=torch.float64, **shallow(name, blocks=1)
    )
    model = backbones.reparameterize(randomize(model).eval())
    other = for_xnnpack(model)
    x = images(2, 3, 96, 64)
    with torch.no_grad():
        assert relative(other(x), model(x)) < 1e-9


@pytest.mark.parametrize(
    "norm, shape",
    [
        (LayerNorm2d(8), (2, 8, 5, 6)),
        (GroupNorm1(8), (2, 8, 5, 6)),
        (nn.GroupNorm(4, 8), (2, 8, 5, 6)),
        (nn.GroupNorm(8, 8, affine=False), (2, 8, 5, 6)),
        (nn.LayerNorm(8), (2, 3, 8)),
        (nn.LayerNorm(8, bias=False, eps=1e-3), (2, 8)),
        (nn.LayerNorm(8, elementwise_affine=False), (2, 5, 6, 8)),
    ],
    ids=str,
)
def test_norms_are_arithmetic_on_whole_maps(norm, shape):
    norm = randomize(norm).double().eval()
    x = images(*shape) * 3 + 1
    with torch.no_grad():
        found = for_xnnpack(nn.Sequential(norm)).double()
        # without parameters the type of the model is not known, and is float32
        assert relative(found(x), norm(x)) < (1e-12 if norm.weight is not None else 1e-6)
    grouped = isinstance(norm, nn.GroupNorm)
    assert type(found[0]) is (DecomposedGroupNorm if grouped else DecomposedNorm)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 3, 4, 5)], ids=str)
def test_group_norms_of_what_is_no_map(shape):
    norm = randomize(nn.GroupNorm(4, 8)).double().eval()
    x = images(*shape)
    with torch.no_grad():
        assert torch.equal(for_xnnpack(nn.Sequential(norm))(x), norm(x))


@pytest.mark.parametrize("last", [False, True])
def test_response_norms_are_means(last):
    norm = randomize(GlobalResponseNorm(8, channels_last=last)).double().eval()
    x = images(2, 8, 5, 8)
    (found,) = for_xnnpack(nn.Sequential(norm))
    with torch.no_grad():
        assert relative(found(x), norm(x)) < 1e-12
    assert type(found) is (GlobalResponseNorm if last else DecomposedResponseNorm)


def test_a_norm_over_two_axes_stays():
    (found,) = for_xnnpack(nn.Sequential(nn.LayerNorm((6, 8))))
    assert type(found) is nn.LayerNorm


def test_xnnpack_runs_nearly_all(tmp_path):
    """Norms, large kernels, views with a free number of images: all of it stays in one part."""
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8), nn.Conv2d(8, 8, 7, padding=3, groups=8)]
    norms = GroupNorm1(8), nn.GroupNorm(4, 8)
    model = nn.Sequential(*layers, *norms, nn.Flatten(), nn.Linear(128, 8), nn.LayerNorm(8))
    report = export(model.eval(), tmp_path / "m.pte", input_size=(3, 16, 16))
    assert report.notes["delegated_share"] > 0.95


@pytest.mark.parametrize(
    "model", [Unequal(), Chosen(), Masked(), Product()], ids=lambda model: type(model).__name__
)
def test_nothing_but_the_call_remains(model, tmp_path):
    """Splits, choices, masks and products of known sizes; the call itself counts as one."""
    pytest.importorskip("executorch")
    report = export(model, tmp_path / "m.pte", input_size=(4, 8, 8), batch_size=1)
    assert report.notes["other_operations"] == 1
