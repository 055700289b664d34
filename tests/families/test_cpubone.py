"""What is particular to CPUBone: its names, its authors' checkpoints, its start of training."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from golden import FOLDER, Golden, assert_logits
from timm.layers import DropPath
from torch import nn

import backbones
from backbones.errors import CheckpointError

PARAMETERS = {
    "cpubone_nano": 6519700,
    "cpubone_t0": 7542100,
    "cpubone_s0": 8732766,
    "cpubone_b0": 10357368,
    "cpubone_b1": 12429112,
    "cpubone_b2": 23856668,
    "cpubone_b2pt5": 30422752,
    "cpubone_b2pt5_deep": 30881344,
    "cpubone_b3": 40742344,
    "cpubone_b0_bfrobust": 10365560,
    "cpubone_b1_bfrobust": 12439352,
    "cpubone_b2_bfrobust": 23872028,
    "cpubone_b1_dwnorm": 12434232,
    "cpubone_b2pt5_dwnorm": 30431968,
}


def golden_of(name):
    return Golden(FOLDER / f"{name}.json.gz")


def authors_keys(state):
    """Rename entries of our layout as the authors' files name them."""
    renames = (
        (r"^stem\.", "backbone.input_stem.op_list."),
        (r"^stages\.(\d)\.", r"backbone.stages.\1.op_list."),
        (r"^head\.in_conv\.", "head.op_list.0."),
        (r"^head\.pre_classifier\.", "head.op_list.2."),
        (r"^head\.classifier\.", "head.op_list.3."),
        (r"\.pwise\.", ".pwise.0."),
    )
    result = {}
    for key, value in state.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def with_biases(state):
    """Move a part of the running means into biases, as in the authors' bf16-robust files."""
    result = dict(state)
    for key, mean in state.items():
        match = re.search(r"(.*main\.(?:inverted|depth)_conv)\.norm\.running_mean$", key)
        if match:
            inner = "conv" if "inverted" in key else "conv.1"
            bias = torch.randn_like(mean)
            result[f"{match[1]}.{inner}.bias"] = bias
            result[key] = mean + bias
    assert len(result) > len(state)
    return result


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models(family="cpubone"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_names_that_timm_owns_stay_timms():
    owned = set(timm.list_models(module="cpubone"))
    ours = {f"backbones_{name}" if name in owned else name for name in PARAMETERS}
    assert owned <= set(PARAMETERS)
    assert ours | {"cpubone_s"} == set(timm.list_models("*cpubone*", module="backbones"))
    assert backbones.model_info("cpubone_s").params == PARAMETERS["cpubone_s0"]


@pytest.mark.parametrize("name", timm.list_models(module="cpubone"))
def test_state_dict_order_and_drop_rates_are_timms(name):
    def drops(model):
        # timm gives a rate, which nothing reads, to downsampling blocks too
        return {
            key: module.drop_prob if isinstance(module, DropPath) else module.p
            for key, module in model.named_modules()
            if (isinstance(module, DropPath) and not re.match(r"stages\.\d\.0\.", key))
            or (isinstance(module, nn.Dropout) and module.p)
        }

    for arguments in ({}, {"drop_path_rate": 0.3}):
        ours = backbones.create_model(name, device="meta", **arguments)
        theirs = timm.create_model(name, device="meta", **arguments)
        assert drops(ours) == drops(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("old", [False, True], ids=["names", "older names"])
def test_biases_in_front_of_norms_are_folded(old):
    """The authors' bf16-robust checkpoints hold convolution biases that their norms take out."""
    golden = golden_of("cpubone_b0_bfrobust__timm")
    state = authors_keys(with_biases(golden.checkpoint()))
    if old:
        parts = {"conv": "0", "norm": "1"}
        state = {
            re.sub(r"\.conv_proj\.(conv|norm)\.", lambda m: f".conv_proj.{parts[m[1]]}.", key): v
            for key, v in state.items()
        }
    before = {key: value.clone() for key, value in state.items()}
    model = backbones.create_model("cpubone_b0_bfrobust", dtype=torch.float64).eval()
    report = backbones.load_checkpoint(model, state)
    assert report.layout == "authors"
    assert not report.missing
    assert_logits(model(golden.input_tensor()), golden)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    getter = backbones.create_model("cpubone_b0_bfrobust", features_only=True, out_indices=(0, 1))
    assert not backbones.load_checkpoint(getter, state).missing


def test_checkpoints_of_the_other_form_are_refused():
    plain = golden_of("cpubone_b0").checkpoint()
    robust = with_biases(golden_of("cpubone_b0_bfrobust__timm").checkpoint())
    for name, state in (("cpubone_b0_bfrobust", plain), ("cpubone_b0", robust)):
        with pytest.raises(CheckpointError, match="does not fit"):
            backbones.load_checkpoint(backbones.create_model(name), state)
    original = backbones.create_model("cpubone_b0_bfrobust", local_norms="proj")
    assert not backbones.load_checkpoint(original, plain).missing


@torch.no_grad()
def test_local_branches_begin_as_the_identity():
    """As the authors train; the downsampling convolutions have no identity and do not."""
    model = backbones.create_model("cpubone_b3", depths=[2, 2, 1, 1], num_classes=2)
    zeros = {key for key, p in model.named_parameters() if not p.any() and key.endswith("weight")}
    assert zeros == {
        f"{prefix}.main.point_conv.norm.weight"
        for prefix in (
            "stem.1",
            "stages.0.1",
            "stages.1.1",
            "stages.2.1.total.1",
            "stages.3.1.total.1",
        )
    }


@torch.no_grad()
def test_attention_sees_only_its_own_image_and_pads_odd_sizes():
    """The padding of an odd map is what the map would be with zeros under and beside it."""
    model = backbones.create_model("cpubone_nano", dtype=torch.float64).eval()
    attention = model.stages[2][1].total[0][0].main[1]
    x = torch.randn(2, 96, 7, 5, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
    torch.testing.assert_close(attention(x), attention(padded)[..., :7, :5])
    assert attention(x).shape == x.shape
