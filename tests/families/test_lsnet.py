"""What is particular to LSNet: bias tables for any map, two heads, the authors' checkpoints."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, assert_feature
from torch import nn

import backbones
from backbones.errors import CheckpointError, UnsupportedError
from backbones.families.lsnet.attention import distance_bias

PARAMETERS = {
    "lsnet_t": 11409832,
    "lsnet_t_distill": 11795600,
    "lsnet_s": 16146304,
    "lsnet_s_distill": 16596200,
    "lsnet_b": 23313608,
    "lsnet_b_distill": 23827632,
}
SMALL = {"depths": [0, 2, 2, 4], "dims": [16, 32, 48, 64], "num_classes": 5}
DENSE = [
    ("lsnet_t_tame", {"table_size": 14}),
    ("lsnet_t_dense@192x256", {"table_size": 14}),
    ("lsnet_t_dense@224x224", {"table_size": 14}),
    ("lsnet_t_dense_tame@224x224", {"table_size": 14}),
    ("lsnet_t_dense_tame@224x224", {}),  # its tables make the model a dense one
]


def golden_of(name):
    return Golden(FOLDER / f"{name}.json.gz")


def small(name="lsnet_t", **arguments):
    """A narrow float64 model in which nothing is zero."""
    model = backbones.create_model(name, **{**SMALL, **arguments}, dtype=torch.float64).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.3, 0.6)
        for key, parameter in model.named_parameters():
            if key.endswith("attention_biases"):
                parameter.normal_()
    return model


def image(side=96, batch=2):
    return torch.randn(batch, 3, side, side, dtype=torch.float64)


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models(family="lsnet"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


@torch.no_grad()
@pytest.mark.parametrize(("name", "arguments"), DENSE)
def test_dense_form(name, arguments):
    """The authors' dense models, and the dense form of their classification checkpoints."""
    golden = golden_of(name)
    model = backbones.create_model("lsnet_t", features_only=True, dtype=torch.float64, **arguments)
    report = backbones.load_checkpoint(model.eval(), golden.checkpoint())
    assert not report.missing
    assert any(key.endswith("attention_bias_idxs") for key in report.dropped)
    assert model.model.table_size == model.model.arguments["table_size"] == 14
    expected = [f for f in golden.features if f["name"].startswith("dense.")]
    assert len(expected) == 4
    for actual, wanted in zip(model(golden.input_tensor()), expected):
        assert_feature(actual, wanted, f"{name} {wanted['name']}")


def authors_matrix(tables):
    """The gathered bias matrix (heads, S*S, S*S), pair by pair."""
    side = math.isqrt(tables.shape[1])
    points = [(y, x) for y in range(side) for x in range(side)]
    rows = [[abs(a - c) * side + abs(b - d) for c, d in points] for a, b in points]
    return tables[:, torch.tensor(rows)]


@pytest.mark.parametrize("size", [(4, 4), (14, 14), (3, 4), (1, 1), (2, 8), (7, 28), (20, 15)])
@pytest.mark.parametrize("table_size", [4, 14])
def test_biases_are_the_authors_at_every_size(size, table_size):
    height, width = size
    tables = torch.randn(4, table_size**2, dtype=torch.float64)
    x = torch.empty(1, 1, height, width)
    expected = tables
    if size != (table_size, table_size):
        square = tables.view(1, 4, table_size, table_size)
        expected = F.interpolate(square, size=(14, 14), mode="bicubic").view(4, 196)
    expected = authors_matrix(expected)
    area = height * width
    if size != (table_size, table_size):
        expected = F.interpolate(expected[None], size=(area, area), mode="bicubic")[0]
    torch.testing.assert_close(distance_bias(x, tables), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("side", [224, 192])
def test_nothing_is_remembered_from_an_earlier_forward(side):
    """Loading after eval() and a forward, then another type: the biases follow."""
    source, x = small(), image(side)
    model = backbones.create_model("lsnet_t", **SMALL).eval()
    model(x.float())
    backbones.load_checkpoint(model, source.state_dict())
    torch.testing.assert_close(model(x.float()), source(x).float(), rtol=1e-3, atol=1e-3)
    model.double().load_state_dict(source.state_dict())
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
    for key, parameter in model.named_parameters():
        if key.endswith("attention_biases"):
            parameter.add_(torch.randn_like(parameter))
    assert (model(x) - source(x)).abs().max() > 1e-6


def test_biases_learn_in_eval_mode_too():
    model = small()
    model(image(224)).square().mean().backward()
    for key, parameter in model.named_parameters():
        if key.endswith("attention_biases"):
            assert parameter.grad.abs().max() > 0, key
    assert any(key.endswith("attention_biases") for key in model.no_weight_decay())


@torch.no_grad()
def test_smaller_tables_are_resized_and_larger_ones_adopted():
    four, fourteen = small(), small(table_size=14)
    given = four.state_dict()
    backbones.load_checkpoint(fourteen, given)
    assert fourteen.table_size == 14
    x = image(192)  # a 3x3 map: both go by tables for 14x14
    torch.testing.assert_close(fourteen(x), four(x), rtol=1e-12, atol=0)
    x = image(256)  # a 4x4 map
    assert (fourteen(x) - four(x)).abs().max() > 1e-6
    adopting = small()
    backbones.load_checkpoint(adopting, fourteen.state_dict())
    assert adopting.arguments["table_size"] == 14
    assert adopting.expected_shapes() == {k: v.shape for k, v in fourteen.state_dict().items()}
    torch.testing.assert_close(adopting(x), fourteen(x), rtol=0, atol=0)
    plain = small()
    plain.load_state_dict(fourteen.state_dict())
    torch.testing.assert_close(plain(x), fourteen(x), rtol=0, atol=0)


def test_impossible_tables_leave_the_model_alone():
    model = small()
    key = next(key for key in model.state_dict() if key.endswith("attention_biases"))
    for shape, message in (((4, 17), "no square map"), ((3, 196), "do not fit")):
        state = {**model.state_dict(), key: torch.zeros(shape)}
        with pytest.raises(CheckpointError, match=message):
            backbones.load_checkpoint(model, state)
        assert model.table_size == 4
        assert model.state_dict()[key].shape == (4, 16)


@torch.no_grad()
def test_two_heads():
    model = small("lsnet_t_distill")
    x = image()
    features = model.forward_features(x)
    one = model.head.fc(model.head.norm(features.mean((2, 3))))
    two = model.head.dist.fc(model.head.dist.norm(features.mean((2, 3))))
    torch.testing.assert_close(model(x), (one + two) / 2)
    assert model.get_classifier() == (model.head.fc, model.head.dist.fc)
    model.set_distilled_training(True)
    torch.testing.assert_close(model(x), (one + two) / 2)
    model.train()
    pair = model(x)
    assert isinstance(pair, tuple)
    assert not torch.equal(*pair)
    model.set_distilled_training(False)
    torch.testing.assert_close(model(x), (pair[0] + pair[1]) / 2)


@pytest.mark.parametrize("distilled_training", [False, True])
def test_both_heads_learn(distilled_training):
    model = small("lsnet_t_distill").train()
    model.set_distilled_training(distilled_training)
    output = model(image(128))
    sum(part.square().mean() for part in (output if distilled_training else [output])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_single_head_takes_no_second_training():
    with pytest.raises(UnsupportedError, match="_distill"):
        small().set_distilled_training(True)


def test_both_classifiers_are_reset_and_named():
    model = small("lsnet_t_distill", head_init_scale=1.0)
    assert model.pretrained_cfg["classifier"] == model.classifier_names
    assert small().pretrained_cfg["classifier"] == "head.fc"
    model.reset_classifier(7)
    for name in model.classifier_names:
        classifier = model.get_submodule(name)
        assert classifier.weight.shape == (7, 64)
        assert classifier.weight.dtype == torch.float64
        assert not classifier.bias.any()
    assert model(image()).shape == (2, 7)
    model.reset_classifier(0)
    assert all(isinstance(layer, nn.Identity) for layer in model.get_classifier())


@torch.no_grad()
def test_weights_of_both_heads_are_kept_or_new_together(tmp_path):
    """A pretrained file with another number of classes loads everything but the classifiers."""
    trained = small("lsnet_t_distill")
    path = backbones.save_checkpoint(trained, tmp_path / "trained.safetensors")
    options = {**SMALL, "num_classes": 9, "dtype": torch.float64}
    model = backbones.create_model("lsnet_t_distill", **options, checkpoint_path=path).eval()
    assert model(image()).shape == (2, 9)
    torch.testing.assert_close(model.head.dist.norm.weight, trained.head.dist.norm.weight)
    x = image()
    torch.testing.assert_close(model.forward_features(x), trained.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["lsnet_t", "lsnet_t_distill"])
def test_head_at_every_position(name):
    """Norm and classifier are affine in eval, so the mean over positions is the pooled result."""
    x = image(160)
    pooled = small(name)
    unpooled = small(name, global_pool="")
    unpooled.load_state_dict(pooled.state_dict())
    maps = unpooled(x)
    assert maps.shape == (2, 5, 3, 3)
    torch.testing.assert_close(maps.mean((2, 3)), pooled(x))
    for model in (pooled, unpooled):
        model.reset_classifier(0)
    assert unpooled(x).shape == (2, 64, 3, 3)
    torch.testing.assert_close(unpooled(x).mean((2, 3)), pooled(x))
    before = pooled.head.norm.running_mean.clone()
    assert unpooled.train()(x).shape == (2, 64, 3, 3)
    assert not torch.equal(unpooled.head.norm.running_mean, before)


@torch.no_grad()
def test_checkpoints_without_any_1x1_branch():
    """The training logs of the authors' B models count none, and a second head besides."""
    source = small("lsnet_t_distill")
    state = source.state_dict()
    reduced = {key: value for key, value in state.items() if ".branches.k1_d1." not in key}
    assert len(reduced) < len(state)
    model = small()
    report = backbones.load_checkpoint(model, reduced)
    assert not report.missing
    assert all(key.startswith("head.dist.") for key in report.dropped)
    assert len(report.dropped) == 7
    for module in source.modules():
        if hasattr(module, "branches"):
            module.branches.k1_d1.norm.weight.zero_()
            module.branches.k1_d1.norm.bias.zero_()
    x = image()
    torch.testing.assert_close(model.forward_features(x), source.forward_features(x))
    getter = backbones.create_model("lsnet_t", **SMALL, features_only=True, out_indices=(1,))
    assert not backbones.load_checkpoint(getter, reduced).missing


BRANCHES = re.compile(r"\.mixer\.(large|branches)\.")


def test_other_absent_parts_are_refused():
    state = small().state_dict()
    some = dict(state)
    del some["stages.1.blocks.0.mixer.branches.k1_d1.conv.weight"]
    neither = {key: value for key, value in state.items() if not BRANCHES.search(key)}
    for broken, count in ((some, 1), (neither, 8 * 5)):
        with pytest.raises(
            CheckpointError, match=rf"missing \({count}\): .*\.mixer\.(large|branches)"
        ):
            backbones.load_checkpoint(small(), broken)
    # tolerating what is absent is no license to zero it
    model = small()
    before = model.stages[1].blocks[0].mixer.branches.k1_d1.norm.bias.clone()
    head = {key: value for key, value in state.items() if key.startswith("head.")}
    backbones.load_checkpoint(model, head, strict=False)
    assert torch.equal(model.stages[1].blocks[0].mixer.branches.k1_d1.norm.bias, before)


def test_training_begins_with_silent_branches():
    model = backbones.create_model("lsnet_t", **SMALL)
    silent = {k for k, p in model.named_parameters() if k.endswith("norm.weight") and not p.any()}
    assert silent == {
        key
        for key in model.state_dict()
        if key.endswith((".mlp.fc2.norm.weight", ".mixer.proj.norm.weight"))
    }
    assert len(silent) == 8 + 2
