"""What is particular to MogaNet: one SiLU or two, and stage norms on the path."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from damping import DAMPING
from golden import FOLDER, Golden, assert_feature, fill

import backbones
from backbones.errors import CheckpointError, ConfigError, InputSizeError

PARAMETERS = {
    "moganet_xtiny": 2956066,
    "moganet_tiny": 5197332,
    "moganet_small": 25335675,
    "moganet_base": 43720475,
    "moganet_large": 82480978,
    "moganet_xlarge": 180991924,
}
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24], "num_classes": 3}


def test_parameter_counts():
    both = PARAMETERS | {f"{name}_silu2": count for name, count in PARAMETERS.items()}
    assert set(both) == set(backbones.list_models(family="moganet"))
    for name, count in both.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


@torch.no_grad()
def test_dense_maps_are_after_the_stage_norms():
    """The next stage and the head read what the authors' dense form returns."""
    golden = Golden(FOLDER / "moganet_xtiny@192x256.json.gz")
    model = backbones.create_model("moganet_xtiny", dtype=torch.float64).eval()
    backbones.load_checkpoint(model, golden.checkpoint())
    _, maps = model.forward_intermediates(golden.input_tensor())
    norms = [stage.downsample[0] for stage in model.stages[1:]]
    dense = [f for f in golden.content["features"] if f["name"].startswith("dense.")]
    for map_, norm, expected in zip(maps[:3], norms, dense[:3], strict=True):
        assert_feature(norm(map_), expected, expected["name"])
    last = model.head.norm(maps[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_feature(last, dense[3], dense[3]["name"])


@torch.no_grad()
def test_the_forms_differ():
    """By a few percent, with the same weights, before and after all merges."""
    golden = Golden(FOLDER / "moganet_xtiny_silu2@192x256.json.gz")
    x = golden.input_tensor()[:, :, :64, :96]
    for deploy in (False, True):
        outputs = []
        for name in ("moganet_xtiny", "moganet_xtiny_silu2"):
            model = backbones.create_model(name, dtype=torch.float64, deploy=deploy).eval()
            backbones.load_checkpoint(model, golden.checkpoint())
            outputs.append(model(x))
        difference = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
        assert 0.002 < difference < 0.1


@pytest.mark.parametrize("given", ["moganet_xtiny", "moganet_xtiny_silu2"])
@pytest.mark.parametrize("deploy", [False, True])
def test_our_files_of_the_other_form_are_refused(tmp_path, given, deploy):
    twice = given.endswith("_silu2")
    other = "moganet_xtiny" if twice else "moganet_xtiny_silu2"
    model = backbones.create_model(given, **SMALL, deploy=deploy).eval()
    path = backbones.save_checkpoint(model, tmp_path / "mine.safetensors")
    receiver = backbones.create_model(other, **SMALL, deploy=deploy).eval()
    before = {key: value.clone() for key, value in receiver.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"silu_twice=.* load it into '{given}'"):
        backbones.load_checkpoint(receiver, path)
    assert all(torch.equal(value, before[k]) for k, value in receiver.state_dict().items())
    with pytest.raises(CheckpointError, match=f"create the model with silu_twice={twice}"):
        backbones.create_model(other, **SMALL, deploy=deploy, checkpoint_path=path)
    again = backbones.load_model(path)
    assert again.silu_twice == model.silu_twice
    backbones.load_checkpoint(
        backbones.create_model(other, **SMALL, deploy=deploy, silu_twice=model.silu_twice), path
    )


def test_a_model_of_openmixups_names_in_the_one_silu_form_is_mentioned(caplog):
    golden = Golden(FOLDER / "moganet_xtiny_silu2@192x256.json.gz")
    with caplog.at_level(logging.WARNING, logger="backbones"):
        model = backbones.create_model("moganet_xtiny_silu2")
        report = backbones.load_checkpoint(model, golden.checkpoint())
        assert not caplog.records
        backbones.load_checkpoint(backbones.create_model("moganet_xtiny"), golden.checkpoint())
    assert report.layout == "openmixup"
    (record,) = caplog.records
    assert "silu_twice=True" in record.getMessage()


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="multiples of 8"):
        backbones.create_model("moganet_xtiny", device="meta", dims=[32, 64, 96, 100])
    model = backbones.create_model("moganet_xtiny", **SMALL).eval()
    with pytest.raises(InputSizeError, match="at least 32"):
        model(torch.zeros(1, 3, 64, 31))
    golden = Golden(FOLDER / "moganet_xtiny.json.gz").checkpoint()
    with pytest.raises(CheckpointError, match="create the variant"):
        backbones.load_checkpoint(backbones.create_model("moganet_tiny"), golden)
    merged = backbones.reparameterize(model, verify=False).state_dict()
    with pytest.raises(CheckpointError, match=r"missing \(\d+\)"):
        backbones.load_checkpoint(model, merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_finite_in_half_types(dtype):
    model = backbones.create_model("moganet_xtiny").eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            factors = [f for p, f in DAMPING["moganet"] if re.search(p, key)]
            value.copy_(fill(key, tuple(value.shape)) * (factors or [1])[0])
    output = model.to(dtype)(fill("input", (1, 3, 96, 64)).to(dtype))
    assert torch.isfinite(output).all()
    assert output.std() > 0.1
