"""What is particular to PatchConvNet: one resolution, and pooling by class tokens."""

from __future__ import annotations

import pytest
import torch
from golden import FOLDER, Golden, assert_feature, assert_logits
from randomized import randomize
from torch import nn

import backbones
from backbones.errors import CheckpointError, ConfigError, InputSizeError, UnsupportedError

PARAMETERS = {
    "s60": 25231096,
    "s120": 47723896,
    "b60": 99388936,
    "b120": 188611336,
    "l60": 176009576,
    "l120": 334294376,
    "s60_multi": 25614712,
}
SMALL = {"depths": [1, 1, 2, 1], "dims": [16] * 4, "num_classes": 5}
TOKENS = "head.global_pool.cls_token.weight"


def small(name="patchconvnet_s60", **arguments):
    arguments = {**SMALL, "dtype": torch.float64, **arguments}
    return randomize(backbones.create_model(name, **arguments)).eval()


def images(height=32, width=48):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


def as_authors(model):
    """The model's weights under the authors' names."""
    names = {"conv_pw": "0", "conv_dw": "2", "se.fc1": "4.conv_reduce", "se.fc2": "4.conv_expand"}
    names = {**names, "conv_pwl": "5"}
    theirs, index = {}, -1
    for key, value in model.state_dict().items():
        rest = key.partition(".blocks.")[2]
        if key.startswith("stem."):
            key = f"patch_embed.proj.{key[5]}.0.weight"
        elif rest:
            _, part = rest.split(".", 1)
            index += part == "gamma"  # each block's first entry
            part = {"gamma": "gamma_1"}.get(part, part).replace("norm.", "norm1.")
            for ours, their in names.items():
                part = part.replace(f"{ours}.", f"attn.qkv_pos.{their}.")
            key = f"blocks.{index}.{part}"
        elif key == TOKENS:
            key, value = "cls_token", value.unsqueeze(0)
        elif key.startswith("head.global_pool."):
            key = key.removeprefix("head.global_pool.").replace("gamma", "gamma_")
            attention = key.split(".")[0] in ("q", "k", "v", "proj")
            key = f"blocks_token_only.0.{'attn.' if attention else ''}{key}"
        else:
            key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        theirs[key] = value
    if model.token_per_class:
        for part in ("weight", "bias"):
            rows = theirs.pop(f"head.{part}").split(1)
            theirs |= {f"head.{i}.{part}": row for i, row in enumerate(rows)}
    return theirs


def assert_same(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# What is built.


def test_parameter_counts():
    names = {f"patchconvnet_{name}" for name in PARAMETERS}
    assert names == set(backbones.list_models(family="patchconvnet"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(f"patchconvnet_{name}", device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_initial_values():
    for name, gamma in (("s60", 1e-4), ("s120", 1e-6), ("s60_multi", 1e-4)):
        model = backbones.create_model(f"patchconvnet_{name}", **SMALL)
        block, pool = model.stages[0].blocks[0], model.head.global_pool
        for scale in (block.gamma, pool.gamma1, pool.gamma2):
            assert torch.equal(scale, torch.full((16,), gamma))
        assert block.conv_dw.bias.abs().max() > 0  # PyTorch's, as the authors leave it
        assert 0 < pool.cls_token.weight.abs().max() < 0.1
        assert model.no_weight_decay() == {TOKENS}


def test_stochastic_depth_is_the_same_in_every_block():
    model = backbones.create_model("patchconvnet_s60", **SMALL, drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == [0.3] * 5


@torch.no_grad()
def test_dropout_acts_on_the_class_token():
    model = small(drop_rate=0.5).train()
    x = images()
    features = model.forward_features(x)
    assert torch.equal(features, model.forward_features(x))
    hidden = [model.forward_head(features, pre_logits=True) for _ in range(2)]
    assert not torch.equal(*hidden)
    assert (hidden[0] != 0).all()
    assert model.head.drop.p == 0
    assert small(drop_rate=0.5, global_pool="avg").head.drop.p == 0.5


def test_bad_arguments_are_refused():
    for dims in ([12] * 4, [16, 16, 16, 32]):
        with pytest.raises(ConfigError, match="one multiple of 8"):
            backbones.create_model("patchconvnet_s60", dims=dims, device="meta")
    with pytest.raises(InputSizeError, match="at least 16"):
        small()(images(15, 32))


# The authors' numbers, beyond logits and the last map.


@torch.no_grad()
@pytest.mark.parametrize("name", ["patchconvnet_s60@192x256", "patchconvnet_s60_multi"])
def test_parts_of_the_head_and_all_merges(name):
    golden = Golden(FOLDER / f"{name}.json.gz")
    model = backbones.create_model(golden.variant, dtype=torch.float64).eval()
    backbones.load_checkpoint(model, golden.checkpoint())
    expected = {feature["name"]: feature for feature in golden.features}
    found = {}
    parts = {"stem": model.stem, "token": model.head.global_pool, "pre_logits": model.head.norm}
    for part, module in parts.items():
        module.register_forward_hook(lambda _, __, out, part=part: found.update({part: out}))
    x = golden.input_tensor()
    last = model.forward_features(x)
    assert_logits(model.forward_head(last), golden)
    found["token"] = found["token"].reshape(expected["token"]["shape"])
    for part in parts:
        assert_feature(found[part], expected[part], part)
    merged = backbones.reparameterize(model, verify=False)
    assert_logits(merged.forward_head(last), golden)
    assert_logits(merged(x), golden)


# One resolution.


@torch.no_grad()
def test_feature_maps_are_taken_after_each_quarter_of_the_blocks():
    model = backbones.create_model("patchconvnet_s60", device="meta")
    assert [len(stage.blocks) for stage in model.stages] == [15] * 4
    model, after = small(), []
    for stage in model.stages:
        stage.blocks[-1].register_forward_hook(lambda _, __, out: after.append(out))
    x = images(40, 70)
    final, maps = model.forward_intermediates(x)
    assert [m.shape for m in maps] == [(2, 16, 3, 5)] * 4  # up where 16 does not divide
    assert all(map(torch.equal, maps, after))
    assert torch.equal(final, maps[-1])
    assert model.feature_info[0] == {"num_chs": 16, "reduction": 16, "module": "stages.0"}


# Class tokens.


@torch.no_grad()
@pytest.mark.parametrize("name", ["patchconvnet_s60", "patchconvnet_s60_multi"])
def test_pooling_written_out(name):
    """A token is among its own keys; tokens of classes are not."""
    model = small(name)
    pool, map_ = model.head.global_pool, model.forward_features(images())
    tokens, rows = pool.cls_token.weight, map_.flatten(2).mT
    expected = []
    for token in tokens:
        keys = rows if model.token_per_class else torch.cat((token.expand(2, 1, 16), rows), 1)
        keys = pool.norm1(keys)
        logits = (pool.k(keys) * pool.q(pool.norm1(token))).sum(-1) / 4
        mixed = (logits.softmax(1).unsqueeze(-1) * pool.v(keys)).sum(1)
        c = token + pool.gamma1 * pool.proj(mixed)
        hidden = nn.functional.gelu(pool.mlp.fc1(pool.norm2(c)))
        expected.append(c + pool.gamma2 * pool.mlp.fc2(hidden))
    vectors = model.head.norm(torch.stack(expected, 1))  # B K C
    if model.token_per_class:
        logits = torch.stack([vectors[:, i] @ w for i, w in enumerate(model.head.fc.weight)], 1)
        assert_same(model.forward_head(map_), logits + model.head.fc.bias)
    else:
        assert_same(model.forward_head(map_, pre_logits=True), vectors[:, 0])


@torch.no_grad()
def test_other_poolings_take_files_with_a_class_token():
    source = small()
    for options in ({"global_pool": "avg"}, {"global_pool": "", "num_classes": 0}):
        model = small(**options)
        report = backbones.load_checkpoint(model, source.state_dict())
        assert TOKENS in report.ignored and not report.missing
        x = images()
        map_ = source.forward_features(x)
        if options["global_pool"]:
            assert_same(model(x), source.head.fc(source.head.norm(map_.mean((2, 3)))))
        else:
            assert_same(model(x), source.head.norm(map_.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        with pytest.raises(UnsupportedError, match="create the model with global_pool='token'"):
            model.reset_classifier(5, "token")
    with pytest.raises(CheckpointError, match="missing"):
        backbones.load_checkpoint(source, small(global_pool="avg").state_dict())
    source.reset_classifier(3, "token")
    assert source(images()).shape == (2, 3)


def test_a_token_for_each_class_follows_the_number_of_classes():
    model = small("patchconvnet_s60_multi")
    x = images()
    for classes in (3, 0, 1, 4):
        model.reset_classifier(classes)
        hidden = model.forward_head(model.forward_features(x), pre_logits=True)
        assert hidden.shape == (2, 16)
        assert model(x).shape == (2, classes or 16)
        assert model.expected_shapes().keys() >= model.state_dict().keys()
    assert model.classifier_names == ("head.fc", "head.global_pool.cls_token")
    assert [layer.weight.shape for layer in model.get_classifier()] == [(4, 16)] * 2
    assert all(layer.weight.std() > 0 for layer in model.get_classifier())
    merged = backbones.reparameterize(model)
    with pytest.raises(UnsupportedError, match="re-parameterize afterwards"):
        merged.reset_classifier(7)
    model.reset_classifier(6, "avg")
    assert model.classifier_names == ("head.fc",)
    assert model(x).shape == (2, 6)


# Files.


@torch.no_grad()
@pytest.mark.parametrize("name", ["patchconvnet_s60", "patchconvnet_s60_multi"])
def test_the_authors_files_of_other_depths_and_classes(name, tmp_path):
    source = small(name)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": as_authors(source), "epoch": 3}, path)
    loaded = backbones.create_model(name, **SMALL, dtype=torch.float64).eval()
    assert backbones.load_checkpoint(loaded, path).layout == "authors"
    assert_same(loaded(images()), source(images()))
    options = {**SMALL, "num_classes": 3, "checkpoint_path": path, "dtype": torch.float64}
    other = backbones.create_model(name, **options).eval()
    assert other(images()).shape == (2, 3)
    assert_same(other.forward_features(images()), source.forward_features(images()))
    embedder = backbones.create_model(name, **{**options, "num_classes": 0}).eval()
    features = embedder.forward_features(images())
    assert_same(embedder.forward_head(features), source.forward_head(features, pre_logits=True))
    pyramid = backbones.create_model(
        name, **{**options, "num_classes": 5}, features_only=True, out_indices=(1,)
    ).eval()
    (map_,) = pyramid(images())
    assert_same(map_, source.forward_intermediates(images(), intermediates_only=True)[1])


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, {"num_classes": 0}])
def test_files_of_the_other_form_are_refused(options, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(as_authors(small()), path)
    arguments = {**SMALL, **options, "checkpoint_path": path}
    if options.get("num_classes") != 0:
        with pytest.raises(CheckpointError, match="create the variant without _multi"):
            backbones.create_model("patchconvnet_s60_multi", **arguments)
    torch.save(as_authors(small("patchconvnet_s60_multi")), path)
    with pytest.raises(CheckpointError, match="create the variant that the file was made for"):
        backbones.create_model("patchconvnet_s60", **arguments)


def test_files_of_other_depths_or_without_a_class_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(as_authors(small(depths=[1, 1, 2, 2])), path)
    with pytest.raises(CheckpointError, match=r"unexpected \(1\d\): 'blocks\.5\."):
        backbones.load_checkpoint(small(), path)
    tensors = as_authors(small("patchconvnet_s60_multi"))
    del tensors["head.2.weight"]
    with pytest.raises(CheckpointError, match="'head.0.weight'"):
        backbones.load_checkpoint(small("patchconvnet_s60_multi"), tensors)
