"""What is particular to GLNet: slots that are pooled or learned, and two classifiers."""

from __future__ import annotations

import pytest
import torch
from golden import FOLDER, Golden
from randomized import randomize

import backbones
from backbones.errors import CheckpointError, ConfigError, InputSizeError, UnsupportedError
from backbones.families.glnet import SlotBlock, pooled

PARAMETERS = {
    "glnet_4g": 27001593,
    "glnet_9g": 60010617,
    "glnet_16g": 106055161,
    "glnet_4g_tklb": 27514593,
    "glnet_9g_tklb": 60779617,
    "glnet_stl": 30296786,
    "glnet_stl_paramslot": 30481106,
}
SMALL = {"depths": [1, 1, 2, 1], "dims": [32, 32, 64, 64], "num_classes": 5}


def small(name="glnet_4g", **arguments):
    arguments = {"dtype": torch.float64, **SMALL, **arguments}
    return randomize(backbones.create_model(name, **arguments)).eval()


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def largest_difference(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


# What is built.


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models(family="glnet"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_initial_values_are_the_authors():
    model = backbones.create_model("glnet_stl", **{**SMALL, "dims": [96, 192, 192, 192]})
    slots, attention = model.stages[2].blocks[0], model.stages[3].blocks[0]
    for attn in (slots.attn, attention.attn):
        assert attn.qkv.weight.std().item() == pytest.approx((2 / (4 * 192)) ** 0.5, rel=0.05)
        assert attn.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # Uniform within 1 / sqrt(fan in) where they have convolutions, truncated normal where not.
    assert slots.mlp.fc1.weight.std().item() == pytest.approx((3 * 192) ** -0.5, rel=0.05)
    assert attention.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert slots.slot_scale.shape == () and slots.slot_scale.item() == pytest.approx(192**-0.5)


def test_bad_arguments_and_inputs_are_refused():
    with pytest.raises(ConfigError, match="multiples of 32"):
        backbones.create_model("glnet_4g", dims=[32, 64, 80, 96], device="meta")
    with pytest.raises(InputSizeError, match="at least 32"):
        small()(images(1, 3, 31, 64))
    with pytest.raises(UnsupportedError, match="_tklb variant"):
        small().set_token_training()
    with pytest.raises(UnsupportedError, match="_tklb variant"):
        small().forward_mixed(images(2, 3, 64, 64), (0, 1, 0, 1))
    with pytest.raises(InputSizeError, match="multiples of 32"):
        small("glnet_4g_tklb").forward_mixed(images(2, 3, 64, 80), (0, 1, 0, 1))


# Slots.


@pytest.mark.parametrize("size", [(56, 56), (14, 14), (7, 5), (3, 20)])
def test_slots_are_means_of_windows_that_may_overlap(size):
    x = images(2, 4, *size)
    height, width = size
    for i, j in ((0, 0), (2, 5), (7, 7)):
        rows = slice(i * height // 8, -(-(i + 1) * height // 8))
        columns = slice(j * width // 8, -(-(j + 1) * width // 8))
        torch.testing.assert_close(pooled(x)[:, 8 * i + j], x[:, :, rows, columns].mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_learned_slots_that_equal_pooled_ones_give_the_same(merged):
    options = (64, 2.0, True, 0.1, 0.0)
    block = randomize(SlotBlock(*options).double()).eval()
    block.slot_scale.fill_(30.0)  # so that slots differ, and with them what positions receive
    other = SlotBlock(*options, param_slots=True).double().eval()
    x = images(1, 64, 13, 18)
    other.load_state_dict({**block.state_dict(), "init_slots": pooled(x)})
    expected = block(x)
    if merged:
        block.reparameterize()
        other.reparameterize()
        assert other.slot_scale is None
    assert largest_difference(block(x), expected) < 1e-13
    assert largest_difference(other(x), expected) < 1e-13
    other.init_slots.copy_(other.init_slots.flip(1))  # another order of slots is none
    assert largest_difference(other(x), expected) < 1e-13
    other.init_slots.copy_(other.init_slots.flip(2))
    assert largest_difference(other(x), expected) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slots_of_maps_whose_squares_overflow(dtype):
    block = SlotBlock(64, 2.0, True, None, 0.0).eval()
    x = images(2, 64, 16, 16).float() * 5000
    expected = block.mix_slots(block.norm1(x), block.first_slots(x))
    block, x = block.to(dtype), x.to(dtype)
    found = block.mix_slots(block.norm1(x), block.first_slots(x))
    assert torch.nn.functional.cosine_similarity(found.float(), expected).min() > 0.98


@pytest.mark.slow
@torch.no_grad()
def test_height_and_width_stay_free_where_slots_are_learned(tmp_path):
    pytest.importorskip("onnxruntime")
    model = small("glnet_stl_paramslot", dtype=torch.float32)
    free = ("batch", "height", "width")
    report = backbones.export(model, tmp_path / "m.onnx", input_size=(3, 64, 64), dynamic=free)
    assert [check.shape for check in report.checks][-1] == (1, 3, 96, 128)
    with pytest.raises(UnsupportedError, match="windows of the map's size"):
        pooling = small(dtype=torch.float32)
        backbones.export(pooling, tmp_path / "m.onnx", input_size=(3, 64, 64), dynamic=free)


# Token labelling.


@torch.no_grad()
def test_training_forward_of_token_labelling():
    golden = Golden(FOLDER / "glnet_4g_tklb_tame.json.gz")
    model = backbones.create_model("glnet_4g_tklb", dtype=torch.float64)
    backbones.load_checkpoint(model, golden.checkpoint())
    expected = golden.content["train_mode"]
    top, left, bottom, right = expected["bbox"]
    main, tokens = model.train().forward_mixed(golden.input_tensor(), (top, bottom, left, right))
    wanted = torch.tensor(expected["main"], dtype=torch.float64)
    assert largest_difference(main, wanted) < 1e-7
    samples = torch.tensor(expected["aux"]["samples"], dtype=torch.float64)
    index = torch.linspace(0, tokens.numel() - 1, len(samples), dtype=torch.float64).long()
    assert list(tokens.shape) == expected["aux"]["shape"]
    assert (tokens.flatten()[index] - samples).abs().max() < 1e-7 * tokens.abs().max()


def test_mixed_tokens_train_every_parameter_and_an_empty_region_changes_nothing():
    model = small("glnet_4g_tklb").train()
    model.set_token_training()
    x = images(2, 3, 64, 96)
    main, tokens = model(x)
    model.set_grad_checkpointing()
    for given, box in (((main, tokens), (0, 0, 0, 0)), ((None, None), (0, 2, 1, 2))):
        model.zero_grad()
        mixed = model.forward_mixed(x, box)
        for found, expected in zip(mixed, given, strict=True):
            assert expected is None or torch.equal(found, expected)
        sum(one.square().sum() for one in mixed).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert largest_difference(mixed[0], main) > 1e-3
    model.reset_classifier(7)
    assert [one.shape for one in model(x)] == [(2, 7), (2, 6, 7)]
    assert [layer.out_features for layer in model.get_classifier()] == [7, 7]
    model.set_token_training(False)
    assert model(x).shape == (2, 7)


# Files of other variants.


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize(
    ("given", "other", "says"),
    [
        ("glnet_stl", "glnet_stl_paramslot", "without _paramslot"),
        ("glnet_stl_paramslot", "glnet_stl", "create glnet_stl_paramslot"),
        ("glnet_4g", "glnet_4g_tklb", "without _tklb"),
        ("glnet_4g_tklb", "glnet_4g", "with _tklb"),
    ],
)
def test_files_of_another_form_are_refused(given, other, says, deploy, tmp_path):
    """Even where classes differ, where only feature maps are needed, or what fits is asked for."""
    weights = small(given).state_dict()
    for options in ({}, {"num_classes": 3}, {"features_only": True}):
        path = tmp_path / "theirs.pth"
        torch.save(weights, path)
        with pytest.raises(CheckpointError, match=says):
            backbones.create_model(
                other, **{**SMALL, **options}, deploy=deploy, checkpoint_path=path
            )
    receiver = small(other, deploy=deploy)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=says):
            backbones.load_checkpoint(receiver, weights, strict=strict)


@pytest.mark.parametrize(
    ("golden", "other", "says"),
    [
        ("glnet_stl", "glnet_stl_paramslot", "without _paramslot"),
        ("glnet_4g_tklb_tame", "glnet_4g", "with _tklb"),
        ("glnet_4g", "glnet_4g_tklb", "without _tklb"),
    ],
)
def test_the_authors_files_of_another_form_are_refused(golden, other, says):
    file = Golden(FOLDER / f"{golden}.json.gz").checkpoint()
    with pytest.raises(CheckpointError, match=says):
        backbones.load_checkpoint(backbones.create_model(other), file)


@pytest.mark.parametrize(
    ("given", "other", "says"),
    [
        ("glnet_stl", "glnet_stl_paramslot", "without _paramslot"),
        ("glnet_stl_paramslot", "glnet_stl", "create glnet_stl_paramslot"),
    ],
)
def test_merged_files_of_another_form_are_refused(given, other, says):
    merged = backbones.reparameterize(small(given), verify=False)
    with pytest.raises(CheckpointError, match=says):
        backbones.load_checkpoint(small(other, deploy=True), merged.state_dict())
    with pytest.raises(CheckpointError, match="missing"):
        backbones.load_checkpoint(small(given), merged.state_dict())
