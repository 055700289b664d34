"""The forms for graph engines compute what the re-parameterized model computes."""

import pytest
import torch
from randomized import randomize
from tiers import families_by_default, shallow
from timm.layers import GroupNorm1, LayerNorm2d, SelectAdaptivePool2d, SqueezeExcite
from torch import nn

import backbones
from backbones import merge
from backbones.engines.rewrites import REWRITES, rewrite_block, rewrite_for_graphs
from backbones.engines.rewrites.attention import SeparateHeads, SeparateProjections
from backbones.engines.rewrites.attnet import SeparateGateMlp
from backbones.engines.rewrites.contrast import (
    ContrastAfter,
    ContrastedProjection,
    contrast_after,
)
from backbones.engines.rewrites.convolutions import depthwise, select_inputs, select_outputs
from backbones.engines.rewrites.hornet import ChannelsFirstBlock, FilteredGates, SeparateGates
from backbones.engines.rewrites.large_kernels import (
    TAPS,
    DepthwiseSum,
    progressions,
    split_large_kernels,
)
from backbones.engines.rewrites.moganet import ContrastedGates, SeparateContrast, SummedBlock
from backbones.engines.rewrites.norms import FEW, DecomposedNorm2d, WholeNorm2d
from backbones.engines.rewrites.spartan import PairMixer, RotatedMixer, side_by_side
from backbones.families import attnet, convnext, hornet, moganet, spartan
from backbones.families.cpubone import ConvAttention
from backbones.families.lsnet import DistanceAttention
from backbones.families.lsnet.large_small_conv import LargeSmallConv
from backbones.families.unireplknet import CenteredNorm2d

NORMS = {CenteredNorm2d, GroupNorm1, LayerNorm2d}


def reparameterized(name, **arguments):
    model = backbones.create_model(name, num_classes=4, dtype=torch.float64, **arguments)
    return backbones.reparameterize(randomize(model).eval())


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def kinds(model):
    return {type(module) for module in model.modules()}


NAMES = [*families_by_default(), "hornet_tiny_gf", "convnextv2_atto", "convnext_dcls_tiny"]


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_the_same(name, decompose):
    model = reparameterized(name, **shallow(name))
    other = rewrite_for_graphs(model, decompose=decompose)
    for size in ((2, 3, 64, 64), (1, 3, 96, 64)):
        x = images(*size)
        with torch.no_grad():
            assert relative(other(x), model(x)) < 1e-12
            _, expected = model.forward_intermediates(x)
            _, found = other.forward_intermediates(x)
            for ours, theirs in zip(found, expected, strict=True):
                assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("decompose", [False, True])
def test_every_form_is_met(decompose):
    """A form that no model has would stand there unused; what is replaced must be gone."""
    names = (
        "attnet_xxs",
        "convnext_atto",
        "cpubone_nano",
        "hornet_tiny_7x7",
        "lsnet_t",
        "moganet_xtiny",
        "spartan_t",
        "unireplknet_a",
    )
    models = [backbones.create_model(name, deploy=True).eval() for name in names]
    replaced = {
        attnet.GatedMlp,
        hornet.Block,
        hornet.GatedConv,
        moganet.Block,
        spartan.ChannelMixer,
        spartan.SpatialMixer,
        ConvAttention,
        DistanceAttention,
        *(NORMS if decompose else ()),
    }
    changed = {convnext.Block, SelectAdaptivePool2d}  # in place
    assert replaced | NORMS == set(REWRITES) - changed
    assert replaced <= set().union(*map(kinds, models))
    after = set().union(
        *(kinds(rewrite_for_graphs(model, decompose=decompose)) for model in models)
    )
    assert not replaced & after
    assert {
        ChannelsFirstBlock,
        SeparateGates,
        PairMixer,
        SeparateGateMlp,
        SeparateHeads,
        SeparateProjections,
        SummedBlock,
    } <= after
    assert ContrastAfter in after
    for form in (RotatedMixer, DecomposedNorm2d, WholeNorm2d):
        assert (form in after) == decompose


def test_channels_stay_where_they_are():
    model = rewrite_for_graphs(reparameterized("convnext_atto"), decompose=True)
    program = torch.export.export(model, (images(1, 3, 64, 64),))
    moves = [n for n in program.graph.nodes if "permute" in str(n.target)]
    assert len(moves) == 0
    assert not any(isinstance(module, nn.Linear) for module in model.stages.modules())


@pytest.mark.parametrize("name", ["attnet_xxs", "cpubone_nano", "hornet_tiny_7x7", "lsnet_t"])
def test_projections_are_not_split(name):
    model = rewrite_for_graphs(reparameterized(name))
    program = torch.export.export(model, (images(1, 3, 64, 64),))
    splits = [n for n in program.graph.nodes if "split" in str(n.target)]
    taps = [m for m in model.modules() if isinstance(m, LargeSmallConv)]  # are split in one
    assert len(splits) == len(taps)
    separate = {SeparateGateMlp, SeparateGates, SeparateHeads, SeparateProjections}
    assert separate & kinds(model)
    assert not {attnet.GatedMlp, hornet.GatedConv, ConvAttention, DistanceAttention} & kinds(model)


def test_the_global_filter_has_projections_of_its_own_where_norms_are_decomposed():
    model = reparameterized("hornet_tiny_gf")
    assert {SeparateGates, hornet.GatedConv} <= kinds(rewrite_for_graphs(model))
    found = kinds(rewrite_for_graphs(model, decompose=True))
    assert {SeparateGates, FilteredGates} <= found and hornet.GatedConv not in found


def pair_mixer(dim, hidden):
    mixer = randomize(spartan.ChannelMixer(dim, hidden, groups=dim)).eval()
    mixer.reparameterize()
    return mixer


def rotation_mixer(dim, hidden):
    mixer = randomize(spartan.ChannelMixer(dim, hidden, groups=hidden)).eval()
    mixer.reparameterize()
    return mixer


def test_rotations_are_told_from_other_mixtures_of_pairs():
    assert type(rewrite_block(rotation_mixer(8, 32), decompose=True)) is RotatedMixer
    assert type(rewrite_block(pair_mixer(8, 16), decompose=True)) is PairMixer
    changed = rotation_mixer(8, 32)
    with torch.no_grad():
        changed.conv.conv.weight[3, 1] += 1e-3
    assert type(rewrite_block(changed, decompose=True)) is PairMixer


def contrasted(gain, bias=True):
    proj = randomize(nn.Conv2d(6, 4, 1, bias=bias).double())
    x = images(2, 6, 5, 7)
    with torch.no_grad():
        y = proj(x)
        expected = y + gain.view(1, -1, 1, 1) * (y - y.mean((2, 3), keepdim=True))
    return proj, merge.split_contrast(proj, gain), x, expected


@pytest.mark.parametrize("bias", [True, False])
def test_the_contrast_after_the_projection(bias):
    gain = torch.tensor([0, 0.5, -3, 1e-5], dtype=torch.float64)
    proj, contrast, x, expected = contrasted(gain, bias)
    proj, after = contrast_after(proj, contrast)
    assert isinstance(after, ContrastAfter) and (proj.bias is None) == (not bias)
    with torch.no_grad():
        assert relative(after(proj(x)), expected) < 1e-12


def test_a_contrast_of_another_kind_keeps_its_convolution():
    for gain in (-1.0, 20.0):  # the projection is zero; 1 + k is too small
        assert contrast_after(*contrasted(torch.full((4,), gain, dtype=torch.float64))[:2]) is None
    proj, contrast, *_ = contrasted(torch.full((4,), 0.5, dtype=torch.float64))
    with torch.no_grad():
        contrast.weight[1, 2] += 1e-9
    assert contrast_after(proj, contrast) is None


def moganet_block(sigma):
    attn = moganet.GatedAggregation(8, dilation=1, init_value=sigma, silu_twice=False)
    mlp = moganet.ContrastMlp(8, 32, dilation=1, init_value=0.1)
    block = moganet.Block(attn, mlp, dim=8, init_value=0.5, rate=0.0)
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and name:
            randomize(module)
    return block.eval().double()


@pytest.mark.parametrize("sigma", [0.3, -1.0])  # with -1 the projection is zero
def test_moganet_with_its_shortcuts_in_sums(sigma):
    block = moganet_block(sigma)
    x = images(2, 8, 7, 6)
    with torch.no_grad():
        expected = block(x)
        block.reparameterize()
        other = rewrite_block(block, decompose=True)
        assert relative(other(x), expected) < 1e-12
    assert isinstance(other, SummedBlock) and isinstance(other.mlp, SeparateContrast)
    assert isinstance(other.attn, ContrastedGates)
    found = other.attn.proj_1
    assert isinstance(found, ContrastedProjection)
    assert isinstance(found.contrast, ContrastAfter) == (sigma != -1)


def test_moganet_splits_only_the_three_orders():
    model = rewrite_for_graphs(reparameterized("moganet_xtiny", **shallow("moganet_xtiny")))
    program = torch.export.export(model, (images(1, 3, 64, 64),))
    found = [n for n in program.graph.nodes if "split" in str(n.target) or "slice" in str(n.target)]
    assert len(found) == sum(len(stage.blocks) for stage in model.stages)


def test_spartan_without_a_fitting_contrast():
    mixer = randomize(spartan.SpatialMixer(8, depthwise=True, init_value=0.1)).eval().double()
    with torch.no_grad():
        mixer.gamma[2] = -1
    x = images(2, 8, 6, 6)
    with torch.no_grad():
        expected = mixer(x)
        mixer.reparameterize()
        other = rewrite_block(mixer, decompose=True)
        assert relative(other(x), expected) < 1e-12
    assert isinstance(other.proj_in.contrast, nn.Conv2d)


@pytest.mark.parametrize("channels", [FEW, FEW + 1])
@pytest.mark.parametrize("kind", [LayerNorm2d, CenteredNorm2d, GroupNorm1])
def test_norms_where_the_data_lies(kind, channels):
    x = images(2, channels, 5, 6) + 3
    if kind is CenteredNorm2d:
        x = x - x.mean(1, keepdim=True)
        norm = CenteredNorm2d(LayerNorm2d(channels))
    else:
        norm = kind(channels)
    norm = randomize(norm).double()
    with torch.no_grad():
        assert relative(rewrite_block(norm, decompose=True)(x), norm(x)) < 1e-12


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "fastmax", ""])
def test_maps_are_pooled_by_reductions(kind):
    pool = SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind))
    x = images(2, 6, 5, 7).to(memory_format=torch.channels_last)
    expected = pool(x)
    other = rewrite_block(pool, decompose=False)
    assert relative(other(x), expected) < 1e-12
    graph = torch.export.export(other, (x,)).run_decompositions().graph
    targets = [str(node.target) for node in graph.nodes]
    assert not [t for t in targets if "adaptive" in t or "as_strided" in t]


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("mixer", [lambda: pair_mixer(8, 16), lambda: rotation_mixer(8, 32)])
def test_ties_for_the_strongest_channel_go_to_the_first(mixer, decompose):
    mixer = mixer().double()
    other = rewrite_block(mixer, decompose=decompose)
    assert isinstance(other, PairMixer | RotatedMixer)
    x = torch.randint(0, 3, (2, 8, 5, 5), generator=torch.Generator().manual_seed(0)).double()
    assert (x == x.amax(1, keepdim=True)).sum(1).max() > 1
    with torch.no_grad():
        assert relative(other(x), mixer(x)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [256, 320])
def test_the_strongest_channel_is_found_in_half_precision(dtype, dim):
    other = rewrite_block(pair_mixer(dim, 2 * dim), decompose=True).to(dtype)
    x = torch.zeros(1, dim, 1, dim)
    x[0, range(dim), 0, range(dim)] = 1  # position i has its strongest channel at i
    token = torch.randn(1, 2 * dim, 1, dim).to(dtype)
    assert torch.equal(other.picked(token, x.to(dtype)), other.gathered(token, x.to(dtype)))


def test_other_groups_keep_their_convolution():
    mixer = pair_mixer(8, 32)  # four channels to four
    assert rewrite_block(mixer, decompose=False) is mixer


@pytest.mark.parametrize("name", ["hornet_tiny_7x7", "spartan_t"])
def test_models_that_are_not_reparameterized_are_left_alone(name):
    model = backbones.create_model(name, num_classes=4).eval()
    assert rewrite_for_graphs(model) is model


def test_parts_of_convolutions():
    conv = randomize(nn.Conv2d(4, 6, 3, stride=2, padding=1).double())
    order = torch.tensor([5, 0, 3])
    x = images(1, 4, 9, 9)
    with torch.no_grad():
        assert relative(select_outputs(conv, order)(x), conv(x)[:, order]) < 1e-12
        turned = torch.tensor([2, 3, 1, 0])
        assert relative(select_inputs(conv, turned)(x[:, turned]), conv(x)) < 1e-12
        each = randomize(nn.Conv2d(6, 6, 3, padding=1, groups=6).double())
        y = images(1, 6, 9, 9)
        assert relative(select_outputs(each, order)(y[:, order]), each(y)[:, order]) < 1e-12
        assert relative(depthwise(each, each.weight, each.bias)(y), each(y)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_two_squeeze_and_excitations_side_by_side(bias):
    first, second = (randomize(SqueezeExcite(8, rd_channels=c, bias=bias)).double() for c in (2, 3))
    joined = side_by_side(first, second)
    x, y = images(2, 8, 5, 5), images(2, 8, 5, 5).flip(0)
    with torch.no_grad():
        expected = torch.cat((first(x), second(y)), dim=1)
        assert relative(joined(torch.cat((x, y), dim=1)), expected) < 1e-12


@pytest.mark.parametrize("count", range(1, 33))
@pytest.mark.parametrize("most", [2, 3, 5, 8])
def test_progressions_part_a_range_around_its_middle(count, most):
    found = progressions(count, most)
    assert sorted(place for places in found for place in places) == list(range(count))
    for places in found:
        assert len(places) <= most
        assert places[0] + places[-1] == count - 1


@pytest.mark.parametrize(
    "kernel, parts, options",
    [
        (7, 3, {"padding": 3}),
        (13, 9, {"padding": 6}),
        (6, 2, {"stride": 2, "padding": 3}),
        ((5, 9), 3, {"stride": (2, 1), "padding": (2, 6)}),
        (7, 3, {"stride": 3, "padding": 5, "bias": False}),
        (7, 3, {"padding": (9, 6), "dilation": (3, 2), "stride": (1, 2)}),
        ((1, 31), 2, {"padding": (0, 15)}),
    ],
)
def test_large_depthwise_kernels_become_sums_of_small_ones(kernel, parts, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, kernel, groups=8, dtype=torch.float64, **options)
    (found,) = split_large_kernels(nn.Sequential(conv))
    assert isinstance(found, DepthwiseSum) and len(found.parts) == parts
    for part in found.parts:
        assert part.weight[0].numel() <= TAPS
    for size in ((20, 20), (15, 31)):
        x = images(2, 8, *size)
        with torch.no_grad():
            assert relative(found(x), conv(x)) < 1e-14


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 8, (1, 11), groups=8),
        nn.Conv2d(8, 16, 7, padding=3, groups=8),
        nn.Conv2d(8, 8, 7, padding=3),
        nn.Conv2d(8, 8, 7, groups=8),
        nn.Conv2d(8, 8, 7, padding=5, groups=8, dilation=2),
        nn.Conv2d(8, 8, 7, padding=3, groups=8, padding_mode="reflect"),
        nn.Conv2d(8, 8, 7, padding="same", groups=8),
    ],
    ids=str,
)
def test_other_kernels_stay(conv):
    (found,) = split_large_kernels(nn.Sequential(conv))
    assert type(found) is nn.Conv2d and found is not conv
