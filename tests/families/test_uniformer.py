"""What is particular to UniFormer: hidden head sizes, two classifiers, pruned tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, assert_feature, assert_logits, fill
from randomized import randomize

import backbones
from backbones.errors import CheckpointError, ConfigError, InputSizeError, UnsupportedError
from backbones.families.uniformer.light import condense, pooled, rescore, restore

PARAMETERS = {
    "small": 21545256,
    "small_plus": 24032552,
    "small_plus_dim64": 24032552,
    "base": 49776552,
    "base_ls": 49796520,
    "large_ls": 99462888,
    "small_tl": 22058256,
    "small_dim64_tl": 22058256,
    "small_plus_tl": 24545552,
    "small_plus_dim64_tl": 24545552,
    "base_tl": 50289552,
    "base_dim64_tl": 50289552,
    "large_ls_tl": 100103888,
}
LIGHT = {"xxs": 10215280, "xs": 16509264}  # with the auxiliary head
HEAD_DIM = {"xxs": 28, "xs": 32, "small_plus": 32}
HEAD_DIM |= {"small_tl": 32, "small_plus_tl": 32, "base_tl": 32}
SMALL = {"depths": [1, 1, 3, 2], "dims": [8, 16, 32, 64], "num_classes": 5}


def small(name="uniformer_small", **arguments):
    arguments = {"head_dim": 16, **SMALL, **arguments}
    return randomize(backbones.create_model(name, dtype=torch.float64, **arguments)).eval()


def golden_model(name, variant, **arguments):
    golden = Golden(FOLDER / f"{name}.json.gz")
    model = backbones.create_model(variant, dtype=torch.float64, **arguments).eval()
    report = backbones.load_checkpoint(model, golden.checkpoint())
    return golden, model, report


def part(golden, key):
    """A golden whose own fields are those of one of its parts."""
    twin = copy.copy(golden)
    twin.content = golden.content[key]
    return twin


# What is built.


def test_parameter_counts():
    names = {f"uniformer_{name}" for name in (*PARAMETERS, *LIGHT)}
    assert names == set(backbones.list_models(family="uniformer"))
    for name, count in (PARAMETERS | LIGHT).items():
        options = {"aux_head": True} if name in LIGHT else {}
        model = backbones.create_model(f"uniformer_{name}", device="meta", **options)
        assert sum(p.numel() for p in model.parameters()) == count, name
        assert model.head_dim == HEAD_DIM.get(name, 64), name


def test_bad_arguments_are_refused():
    with pytest.raises(ConfigError, match="head_dim=48 must divide"):
        backbones.create_model("uniformer_small", head_dim=48, device="meta")
    with pytest.raises(ConfigError, match="prune_tokens"):
        backbones.create_model("uniformer_small", aux_head=True, device="meta")
    with pytest.raises(UnsupportedError, match="aux_head=True"):
        small().set_distilled_training()
    with pytest.raises(UnsupportedError, match="_tl variant"):
        small().set_token_training()
    with pytest.raises(InputSizeError, match="at least 32"):
        small()(torch.zeros(1, 3, 31, 64, dtype=torch.float64))


# The authors' numbers, beyond logits and stages.


@torch.no_grad()
@pytest.mark.parametrize("name", ["uniformer_xxs@192x256", "uniformer_xxs@32x64_tame"])
def test_class_tokens_and_scores_after_every_block(name):
    """Also on maps of two tokens, whose scores the authors' code takes for those of a whole map."""
    golden, model, report = golden_model(name, "uniformer_xxs", aux_head=True)
    assert report.dropped == ()
    states = {}
    for i in (2, 3):
        for j, block in enumerate(model.stages[i].blocks):
            block.register_forward_hook(
                lambda _, __, state, at=f"{i}.{j}": states.__setitem__(at, state)
            )
    model(golden.input_tensor())
    last, count = f"2.{len(model.stages[2].blocks) - 1}", 0
    for feature in golden.features:
        kind, _, at = feature["name"].partition(".")
        if kind in ("cls", "score"):
            x, token, score = states[at]
            if kind == "score" and at == last:
                score = pooled(score, x.shape[-2:])
            assert_feature(token if kind == "cls" else score, feature, feature["name"])
            count += 1
    assert count == 2 * (8 + 2)


@torch.no_grad()
def test_training_forward_of_the_light_form():
    golden, model, _ = golden_model("uniformer_xxs", "uniformer_xxs", aux_head=True)
    model.train().set_distilled_training()
    main, of_class_token = model(golden.input_tensor())
    assert_logits(main, part(golden, "train_mode"), "main")
    assert_logits(of_class_token, part(golden, "train_mode"), "cls")


@torch.no_grad()
def test_training_forward_and_parts_of_token_labelling():
    golden, model, _ = golden_model("uniformer_small_tl", "uniformer_small_tl")
    x = golden.input_tensor()
    features = model.forward_features(x)
    assert_logits(
        model.head.fc(model.forward_head(features, pre_logits=True)), golden, "main_logits"
    )
    model.train().set_token_training()
    main, tokens = model(x)
    assert_logits(main, part(golden, "train_mode"), "main")
    assert_feature(tokens, golden.content["train_mode"]["aux"], "tokens")
    model.set_token_training(False)
    assert model(x).shape == main.shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["uniformer_small@192x256", "uniformer_xxs@192x256"])
def test_dense_maps_are_layer_norms_of_the_stages(name):
    golden, model, _ = golden_model(name, name.partition("@")[0])
    _, maps = model.forward_intermediates(golden.input_tensor())
    extra = {k: fill(k, tuple(shape)) for k, shape in golden.content["dense_extra_keys"].items()}
    dense = [f for f in golden.features if f["name"].startswith("dense.")]
    for i, (map_, expected) in enumerate(zip(maps, dense, strict=True), start=1):
        weight, bias = extra[f"norm{i}.weight"], extra[f"norm{i}.bias"]
        last = F.layer_norm(map_.permute(0, 2, 3, 1), weight.shape, weight, bias, eps=1e-6)
        assert_feature(last.permute(0, 3, 1, 2), expected, expected["name"])


# Two classifiers.


def test_the_best_token_counts_half_before_and_after_all_merges():
    model = small(token_head=True)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    map_ = model.head.norm(model.forward_features(x))
    tokens = model.head.token_fc(map_.flatten(2).mT)
    expected = model.head.fc(map_.mean((2, 3))) + tokens.max(1).values / 2
    merged = backbones.reparameterize(model)
    assert merged.head.token_weight == 1
    for one in (model, merged):
        assert (one(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert [layer.out_features for layer in model.get_classifier()] == [7, 7]
    assert model.classifier_names == ("head.fc", "head.token_fc")


def test_the_auxiliary_head_trains_is_reset_and_is_dropped_when_merged():
    model = small("uniformer_xxs", aux_head=True)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    logits = model(x)
    merged = backbones.reparameterize(model)
    assert merged.aux_head is None
    assert not [key for key in merged.state_dict() if "aux_head" in key]
    assert (merged(x) - logits).abs().max() < 1e-12 * logits.abs().max()
    assert model.train()(x).shape == (2, 5)
    model.set_distilled_training()
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        main, auxiliary = model(x)
        (main.square().sum() + auxiliary.square().sum()).backward()
        assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(3)
    assert [one.shape for one in model(x)] == [(2, 3)] * 2
    assert {k: v.shape for k, v in model.state_dict().items()} == model.expected_shapes()
    model.prune_intermediate_layers([3])
    assert model.aux_head is None


# Pruned tokens.


@torch.no_grad()
def test_as_many_tokens_are_chosen_as_published():
    model = backbones.create_model("uniformer_xxs").eval()
    chosen = {}
    for i in (2, 3):
        attn = model.stages[i].blocks[-1].attn
        attn.qkv.register_forward_hook(
            lambda _, inputs, __, i=i: chosen.setdefault(i, []).append(inputs[0].shape[1] - 2)
        )
    for side in (128, 160, 192, 224):
        model(torch.randn(1, 3, side, side))
    assert chosen == {2: [32, 50, 72, 98], 3: [8, 12, 18, 24]}


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_tokens_go_back_where_they_came_from(count):
    tokens = torch.randn(2, count, 4, dtype=torch.float64)
    score = torch.rand(2, count, dtype=torch.float64)
    index, few = condense(tokens, score)
    chosen = count // 2
    assert index.shape == (2, chosen) and few.shape == (2, chosen + 1, 4)
    for b in range(2):
        order = score[b].argsort(descending=True)
        best, others = order[:chosen], order[chosen:]
        assert set(index[b].tolist()) == set(best.tolist())
        mean = (score[b, others, None] * tokens[b, others]).sum(0) / score[b, others].sum()
        torch.testing.assert_close(few[b, -1], mean)
        back = restore(tokens, index, 10 * few[:, :-1], few[:, -1:])[b]
        torch.testing.assert_close(back[best], 10 * tokens[b, best])
        torch.testing.assert_close(back[others], tokens[b, others] + mean)
        attention = torch.rand(2, chosen + 1, dtype=torch.float64)
        after = rescore(score, index, attention)[b]
        torch.testing.assert_close(after[index[b]], (score[b, index[b]] + attention[b, :-1]) / 2)
        rest = (score[b, others] + attention[b, -1]) / 2 if count < 3 else score[b, others]
        torch.testing.assert_close(after[others], rest)


def test_scores_that_are_zero_stay_finite():
    tokens, score = torch.randn(1, 6, 4), torch.tensor([[0.5, 0.5, 0.5, 0, 0, 0]])
    assert torch.isfinite(condense(tokens, score)[1]).all()
    assert torch.isfinite(pooled(torch.zeros(1, 9), (3, 3))).all()


def test_of_equal_scores_the_first_are_chosen():
    score = torch.tensor([[0.1] * 7, [0.1, 0.2, 0.1, 0.1, 0.3, 0.1, 0.1], [0.0] * 6 + [0.5]])
    index, _ = condense(torch.randn(3, 7, 4), score)
    assert [sorted(row) for row in index.tolist()] == [[0, 1, 2], [0, 1, 4], [0, 1, 6]]


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".xml", marks=pytest.mark.slow)])
def test_a_fresh_light_form_leaves_for_engines(suffix, tmp_path):
    """Its class token is zeros, so that it finds all tokens equally good."""
    pytest.importorskip("openvino" if suffix == ".xml" else "onnxruntime")
    torch.manual_seed(0)
    model = backbones.create_model("uniformer_xxs", depths=[1, 1, 2, 1]).eval()
    report = backbones.export(model, tmp_path / f"m{suffix}", input_size=(3, 160, 160))
    assert max(check.agreement.relative_error for check in report.checks) < 1e-5


def test_a_map_of_one_token_leaves_for_openvino(tmp_path):
    """Half of one token is none."""
    pytest.importorskip("openvino")
    model = small("uniformer_xxs").float()
    report = backbones.export(model, tmp_path / "m.xml", input_size=(3, 32, 32))
    assert [check.shape for check in report.checks] == [(1, 3, 32, 32), (5, 3, 32, 32)]


@torch.no_grad()
@pytest.mark.parametrize("deploy", [False, True])
def test_half_types_and_autocast_choose_by_scores_in_float32(deploy):
    """324 tokens, more than bfloat16 can number."""
    model = small("uniformer_xxs").float()
    model = backbones.reparameterize(model) if deploy else model
    x = fill("input", (1, 3, 288, 288)).float()
    expected, scores = model(x), []
    for block in model.stages[2].blocks:
        block.register_forward_hook(lambda _, __, state: scores.append(state[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert set(scores) == {torch.float32}
    for found in (mixed, half):
        assert torch.nn.functional.cosine_similarity(found.float(), expected) > 0.99


def test_the_light_form_is_another_than_plain_attention():
    """With equal weights: by a tenth and more."""
    light = small("uniformer_xxs")
    plain = small("uniformer_xxs", prune_tokens=False)
    weights = light.state_dict()
    plain.load_state_dict({key: weights[key] for key in plain.state_dict()})
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    expected = light(x)
    assert (plain(x) - expected).abs().max() > 0.02 * expected.abs().max()
    with pytest.raises(CheckpointError, match="cls_token"):
        backbones.load_checkpoint(plain, weights)


# Files of other variants.


@pytest.mark.parametrize("deploy", [False, True])
def test_our_files_of_another_head_dim_are_refused(tmp_path, deploy):
    model = backbones.create_model("uniformer_small_plus", **SMALL, deploy=deploy).eval()
    path = backbones.save_checkpoint(model, tmp_path / "mine.safetensors")
    other = backbones.create_model("uniformer_small_plus", **SMALL, head_dim=16, deploy=deploy)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"head_dim=32, and .*head_dim=16; load it into"):
        backbones.load_checkpoint(other, path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert backbones.load_checkpoint(model, path).assumed == ()
    assert backbones.load_model(path).head_dim == 32


NAMED = {
    "uniformer_small_in1k": 64,
    "uniformer_small_plus_in1k": 32,
    "uniformer_small_plus_dim64_in1k": 64,
    "uniformer_base_ls_in1k": 64,
    "uniformer_small_tl_224": 32,
    "uniformer_small_dim64_tl_224": 64,
    "uniformer_small_plus_tl_384": 32,
    "uniformer_base_tl_224": 32,
    "uniformer_large_ls_tl_384": 64,
    "uniformer_xxs_128_in1k": 28,
    "uniformer_xs_192_in1k": 32,
    "uniformer_smaller": None,
    "model_best": None,
}


@pytest.mark.parametrize("name", NAMED)
def test_the_names_of_released_files_tell_head_dim(name, tmp_path):
    """A file named for another head size is refused; of one without a name the report says so."""
    needed = NAMED[name]
    source = backbones.create_model("uniformer_small", **SMALL, head_dim=16)
    path = tmp_path / f"{name}.pth"
    torch.save({"model": source.state_dict()}, path)
    model = backbones.create_model("uniformer_small", **SMALL, head_dim=8)
    if needed is None:
        report = backbones.load_checkpoint(model, path)
        assert report.assumed == ("head_dim=8",)
        assert "not told by the file, as the model has it: head_dim=8" in str(report)
        return
    with pytest.raises(
        CheckpointError, match=rf"by the name '{name}'.*create the model with head_d"
    ):
        backbones.load_checkpoint(model, path)
    dims = [8, 16, 7 * 64, 7 * 64]
    other = backbones.create_model("uniformer_small", **{**SMALL, "dims": dims}, head_dim=needed)
    torch.save({"model": other.state_dict()}, path)
    assert backbones.load_checkpoint(other, path).assumed == ()


def test_the_two_codes_of_the_authors_use_the_same_names(tmp_path):
    """`uniformer_small` of that for token labelling has heads of 32 and a second classifier."""
    labelled = backbones.create_model("uniformer_small_tl", **SMALL)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"arch": "uniformer_small", "state_dict": labelled.state_dict()}, path)
    assert backbones.load_checkpoint(labelled, path).assumed == ()
    other = backbones.create_model("uniformer_small_tl", **SMALL, head_dim=16)
    with pytest.raises(CheckpointError, match="head_dim=32"):
        backbones.load_checkpoint(other, path)
    plain = backbones.create_model("uniformer_small", **SMALL, head_dim=32)
    with pytest.raises(CheckpointError, match="token_fc"):
        backbones.load_checkpoint(plain, path)
    with pytest.raises(CheckpointError, match="without _tl"):
        backbones.load_checkpoint(labelled, plain.state_dict())
    torch.save(plain.state_dict(), path)
    for options in ({"num_classes": 3}, {"features_only": True}):
        with pytest.raises(CheckpointError, match="without _tl"):
            backbones.create_model(
                "uniformer_small_tl", **{**SMALL, **options}, checkpoint_path=path
            )


@torch.no_grad()
def test_a_wrong_head_dim_shows_in_the_logits():
    golden, model, _ = golden_model("uniformer_small_plus_tame", "uniformer_small_plus")
    other = backbones.create_model("uniformer_small_plus_dim64", dtype=torch.float64).eval()
    report = backbones.load_checkpoint(other, golden.checkpoint())
    assert report.assumed == ("head_dim=64",)
    x = golden.input_tensor()[:, :, :96, :64]
    expected = model(x)
    assert (other(x) - expected).abs().max() > 0.1 * expected.abs().max()
