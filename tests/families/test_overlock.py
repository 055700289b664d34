"""OverLoCK's own: its counts, auxiliary head, overview, enlarged maps and named feature modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, assert_feature, assert_logits
from torchvision.models.feature_extraction import create_feature_extractor

import backbones
from backbones.errors import UnsupportedError
from backbones.families.overlock.dynamic_conv import DynamicConv, _enlarge, _shrink
from backbones.families.overlock.model import OverLoCK
from backbones.weights import load_pretrained

SMALL = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 64], "focus_depths": [2, 1], "groups": [4, 4]}


def small(**arguments) -> OverLoCK:
    """A model of the family's structure that runs in milliseconds."""
    model = OverLoCK(**SMALL, num_classes=5, **arguments)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "params", "aux_params", "entries"),
    [
        ("overlock_xt", 16.970, 17.307, 1564),
        ("overlock_t", 34.476, 34.990, 2737),
        ("overlock_s", 57.796, 58.310, 3765),
        ("overlock_b", 97.435, 98.013, 4793),
    ],
)
def test_counts(name, params, aux_params, entries):
    model = backbones.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params
    model = backbones.create_model(name, device="meta", aux_head=True)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == aux_params
    assert len(model.state_dict()) == entries


@torch.no_grad()
def test_base_overview_and_auxiliary_logits():
    golden = Golden(FOLDER / "overlock_xt@192x256.json.gz")
    model = backbones.create_model("overlock_xt", aux_head=True, dtype=torch.float64).eval()
    report = backbones.load_checkpoint(model, golden.checkpoint())
    assert report.dropped == ()
    base, overview = (model.stages[i] for i in (2, 3))
    caught = []
    for stage in (base, overview):
        stage.register_forward_hook(lambda _, __, output: caught.append(output))
    assert_logits(model(golden.input_tensor()), golden)
    expected = [f for f in golden.features if f["name"].startswith("base.")]
    assert len(caught) == len(expected) == 2
    for actual, wanted in zip(caught, expected):
        assert_feature(actual, wanted, wanted["name"])
    assert_logits(model.aux_head(caught[1]), golden, "aux_logits")


@pytest.mark.slow
def test_training_forward_of_the_authors():
    golden = Golden(FOLDER / "overlock_xt.json.gz")
    model = backbones.create_model("overlock_xt", aux_head=True, dtype=torch.float64)
    backbones.load_checkpoint(model, golden.checkpoint())
    model.train().set_distilled_training()
    with torch.no_grad():
        outputs = model(golden.input_tensor())
    for actual, key in zip(outputs, ("main", "aux")):
        wanted = copy.copy(golden)
        wanted.content = golden.content["train_mode"]
        assert_logits(actual, wanted, key)


def test_auxiliary_entries_are_dropped_and_listed():
    with_head, without = small(aux_head=True), OverLoCK(**SMALL, num_classes=5).eval()
    report = backbones.load_checkpoint(without, with_head.state_dict())
    own = {key for key in with_head.state_dict() if key.startswith("focus.aux_head.")}
    assert set(report.dropped) == own
    assert len(own) == 7
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(without(x), with_head(x))


def test_forward_is_a_pair_only_in_distilled_training():
    model, x = small(aux_head=True), torch.randn(2, 3, 64, 64)
    logits = model(x)
    assert logits.shape == (2, 5)
    assert model.train()(x).shape == (2, 5)
    model.set_distilled_training(True)
    main, auxiliary = model(x)
    assert main.shape == auxiliary.shape == (2, 5)
    (main.sum() + auxiliary.square().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.set_grad_checkpointing()
    assert len(model(x)) == 2
    assert model.eval()(x).shape == (2, 5)
    model.train().set_distilled_training(False)
    assert model(x).shape == (2, 5)
    with pytest.raises(UnsupportedError, match="aux_head=True"):
        small().set_distilled_training(True)


def test_both_classifiers_are_reset_and_pruned_with_the_head():
    model = small(aux_head=True)
    model.reset_classifier(3)
    model.train().set_distilled_training()
    assert [o.shape for o in model(torch.randn(2, 3, 64, 64))] == [(2, 3)] * 2
    assert model.classifier_names == ("head.fc", "focus.aux_head.fc")
    assert {k: v.shape for k, v in model.state_dict().items()} == model.expected_shapes()
    model.prune_intermediate_layers([3])
    assert model.aux_head is None
    assert model(torch.randn(2, 3, 64, 64)).ndim == 4


def test_both_classifiers_stay_fresh_for_another_number_of_classes(tmp_path):
    path = tmp_path / "small.pth"
    source = small(aux_head=True).state_dict()
    torch.save(source, path)
    model = OverLoCK(**SMALL, num_classes=3, aux_head=True)
    report = load_pretrained(model, path, new_classifier=True)
    fresh = {
        f"{head}.fc.{kind}" for head in ("head", "focus.aux_head") for kind in ("weight", "bias")
    }
    assert set(report.dropped) == fresh
    loaded = {k for k, v in model.state_dict().items() if k not in fresh}
    assert all(torch.equal(model.state_dict()[key], source[key]) for key in loaded)


@torch.no_grad()
def test_named_modules_give_the_feature_maps():
    model = small()
    x = torch.randn(1, 3, 96, 64)
    taps = model.forward_intermediates(x, intermediates_only=True)
    names = [info["module"] for info in model.feature_info]
    caught = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: caught.__setitem__(name, output)
        )
    model(x)
    assert all(torch.equal(caught[name], tap) for name, tap in zip(names, taps))
    # The trace holds for other sizes too, where maps are enlarged or not.
    extractor = create_feature_extractor(model, names)
    for size in ((96, 64), (224, 256)):
        x = torch.randn(1, 3, *size)
        taps = model.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(m, tap) for m, tap in zip(extractor(x).values(), taps))


@torch.no_grad()
def test_pruning_keeps_the_overview_for_the_focus_net_alone():
    x = torch.randn(1, 3, 64, 64)
    for last, parts in ((1, {"stem", "stages"}), (2, {"stem", "stages", "focus"})):
        model = small()
        tap = model.forward_intermediates(x, [last], intermediates_only=True)[0]
        model.prune_intermediate_layers([last])
        assert {key.split(".")[0] for key in model.state_dict()} == parts
        assert len(model.stages) == (2 if last == 1 else 4)
        assert not any(key.startswith("focus.stages.1.") for key in model.state_dict())
        assert torch.equal(model.forward_features(x), tap)


@pytest.mark.parametrize(
    ("size", "kernel_size", "expected"),
    [
        ((10, 10), 13, (13, 13)),
        ((12, 16), 13, (13, 17)),
        ((6, 8), 7, (7, 9)),
        ((13, 20), 13, (13, 20)),
        # One less than the exact 63 and 117: the authors multiply in floating point.
        ((5, 45), 7, (7, 62)),
        ((3, 27), 13, (13, 116)),
        # Rounding that would miss the kernel itself is corrected.
        ((11, 11), 15, (15, 15)),
    ],
)
def test_small_maps_are_enlarged_to_the_kernel(size, kernel_size, expected):
    for flip in (False, True):
        x = torch.empty(1, 2, *(size[::-1] if flip else size), device="meta")
        large = _enlarge(x, kernel_size)
        assert large.shape[-2:] == (expected[::-1] if flip else expected)
        assert _shrink(large, x).shape == x.shape


def test_dynamic_conv_is_the_definition():
    """Step by step as the paper writes it, with explicit windows and channel orders."""
    torch.manual_seed(3)
    dim, context, kernel_size, groups, height, width = 24, 8, 7, 3, 8, 9
    layer = DynamicConv(dim, context, kernel_size, groups).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    values = torch.randn(2, dim, height, width, dtype=torch.float64)
    guide = torch.randn(2, dim + context, height, width, dtype=torch.float64)
    query = layer.query(guide[:, :dim]) * (dim // groups) ** -0.5
    key = layer.key(F.adaptive_avg_pool2d(guide[:, dim:], 7)).flatten(2)
    share, channels = dim // 2 // groups, dim // 2 // groups
    mixed = torch.empty_like(values)
    for group in range(groups):
        own = slice(group * share, (group + 1) * share)
        affinity = torch.einsum("bchw,bcl->bhwl", query[:, own], key[:, own])
        logits = affinity @ layer.kernel.weight.T + layer.kernel.bias
        for half, k, table in ((0, 5, layer.bias_small), (1, kernel_size, layer.bias_large)):
            part = logits[..., :25] if half == 0 else logits[..., 25:]
            first = half * dim // 2 + group * channels
            for i in range(height):
                for j in range(width):
                    top = min(max(i - k // 2, 0), height - k)
                    left = min(max(j - k // 2, 0), width - k)
                    rows, cols = top - i + k - 1, left - j + k - 1
                    bias = table[group, rows : rows + k, cols : cols + k].flatten()
                    weight = (part[:, i, j] + bias).softmax(-1).unflatten(1, (k, k))
                    window = values[:, first : first + channels, top : top + k, left : left + k]
                    mixed[:, first : first + channels, i, j] = (window * weight[:, None]).sum(
                        (2, 3)
                    )
    torch.testing.assert_close(layer(values, guide), layer.proj(mixed), rtol=1e-12, atol=1e-12)
