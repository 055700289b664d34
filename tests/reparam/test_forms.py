"""Loading, saving and refusing the deploy form; the authors' merged checkpoints; timm's models."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from golden import FOLDER, Golden, assert_feature, assert_logits
from randomized import randomize
from tiers import GOLDEN_LIMIT, parameters_of, shallow, smallest_of_each_family
from torch import nn

import backbones
from backbones import merge
from backbones.cli import main
from backbones.errors import CheckpointError, EquivalenceError, UnsupportedError
from backbones.reparameterization import reparameterize_with_report
from backbones.timm_bridge import as_ours
from backbones.weights import read_metadata


def make(name: str, **arguments: object) -> nn.Module:
    return randomize(backbones.create_model(name, num_classes=4, **arguments)).eval()


def image(side: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3)).to(dtype)


def merged_goldens() -> list[object]:
    return [
        pytest.param(
            path,
            id=path.name,
            marks=[pytest.mark.slow] if parameters_of(Golden(path).variant) > GOLDEN_LIMIT else [],
        )
        for path in sorted(FOLDER.glob("*.json.gz"))
        if "_deploy" in path.name or "_reparam" in path.name
    ]


@pytest.mark.parametrize("deploy", [False, True], ids=["training form", "deploy form"])
@pytest.mark.parametrize("path", merged_goldens())
def test_the_authors_merged_checkpoints_load_into_both_forms(path, deploy):
    golden = Golden(path)
    model = backbones.create_model(golden.variant, dtype=torch.float64, deploy=deploy).eval()
    report = backbones.load_checkpoint(model, golden.checkpoint())
    assert not report.missing and not report.unexpected
    with torch.no_grad():
        last, maps = model.forward_intermediates(golden.input_tensor())
        assert_logits(model.forward_head(last), golden)
    for actual, wanted in zip(maps, golden.stages(), strict=True):
        assert_feature(actual, wanted, wanted["name"])


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_checkpoints_of_the_training_form_are_merged_on_the_way(name, tmp_path):
    source = make(name, **shallow(name))
    path = backbones.save_checkpoint(source, tmp_path / "training.safetensors")
    created = backbones.create_model(name, num_classes=4, deploy=True, checkpoint_path=path)
    loaded = backbones.create_model(name, num_classes=4, deploy=True, **shallow(name))
    report = backbones.load_checkpoint(loaded, path)
    assert report.layout == "backbones" and not report.missing
    features = backbones.create_model(name, features_only=True, deploy=True, **shallow(name))
    backbones.load_checkpoint(features, path)
    x = image()
    with torch.no_grad():
        expected = source(x)
        maps = source.forward_intermediates(x, intermediates_only=True)
        for model in (created, loaded):
            assert not model.training and model.deployed
            assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()
        for one, other in zip(maps, features(x), strict=True):
            assert (one - other).abs().max() < 1e-4 * one.abs().max()


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_files_keep_their_form(name, tmp_path):
    merged = backbones.reparameterize(make(name, **shallow(name)))
    path = backbones.save_checkpoint(merged, tmp_path / "deploy.safetensors", classes=list("abcd"))
    assert read_metadata(path)["backbones"]["deploy"] is True
    again = backbones.create_model(name, deploy=True, checkpoint_path=path)
    assert again.num_classes == 4
    fresh = backbones.create_model(name, num_classes=4, deploy=True, **shallow(name))
    backbones.load_checkpoint(fresh, path)
    for model in (again, fresh):
        state = model.state_dict()
        assert state.keys() == merged.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in merged.state_dict().items())
    training = backbones.create_model(name, num_classes=4, **shallow(name))
    with pytest.raises(CheckpointError, match="deploy=True"):
        backbones.load_checkpoint(training, path)
    with pytest.raises(CheckpointError, match="deploy=True"):
        backbones.create_model(name, checkpoint_path=path)


def test_a_wrong_checkpoint_leaves_a_deployed_model_as_it_was():
    model = backbones.reparameterize(make("convnext_atto"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        backbones.load_checkpoint(model, make("inception_next_atto").state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_training_is_refused_unless_asked_for():
    model = backbones.create_model("lsnet_t", num_classes=4, deploy=True)
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(UnsupportedError, match="deploy_trainable"):
            whole.train()
    model.deploy_trainable = True
    model.train()(image()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_training_mode_is_refused_with_the_name_of_the_part():
    model = make("convnext_atto")
    model.stages[1].train()
    with pytest.raises(UnsupportedError, match=r"stages\.1 .*eval\(\)"):
        backbones.reparameterize(model)


def test_a_wrong_merge_is_found_named_and_undone(monkeypatch):
    right = merge.scale_into_previous

    def wrong(linear, scale, rows=slice(None)):
        if linear is not None and scale is not None and linear.weight.shape[0] == 160:
            scale = 1.01 * scale
        right(linear, scale, rows)

    monkeypatch.setattr(merge, "scale_into_previous", wrong)
    model = make("convnext_atto")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(EquivalenceError, match=r"stage 2 .*'stages\.2\.blocks\.0'"):
        backbones.reparameterize(model, inplace=True)
    assert model.state_dict().keys() == before.keys()
    backbones.reparameterize(model, verify=False)  # the user may insist


def test_models_without_finite_values_cannot_be_compared():
    model = make("convnext_atto")
    with torch.no_grad():
        model.stem[0].weight[0] = float("nan")
    with pytest.raises(EquivalenceError, match="not finite"):
        backbones.reparameterize(model)


def test_something_else_is_refused():
    with pytest.raises(UnsupportedError, match="no model of this package or of timm"):
        backbones.reparameterize(nn.Sequential(nn.Conv2d(3, 4, 1)).eval())


@pytest.mark.parametrize("name", ["convnext_atto", "inception_next_atto", "cpubone_nano"])
def test_timms_own_instances_are_rebuilt_as_ours(name):
    theirs = randomize(timm.create_model(name, num_classes=4, in_chans=1)).eval()
    assert type(theirs).__module__.startswith("timm.")
    ours = as_ours(theirs)
    assert type(ours).__module__.startswith("backbones.")
    merged, report = reparameterize_with_report(theirs)
    assert merged.deployed and report.largest_difference < 1e-10
    x = image()[:, :1]
    with torch.no_grad():
        expected = theirs(x)
        assert (merged(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(UnsupportedError, match="in place"):
        backbones.reparameterize(theirs, inplace=True)


def test_timms_instances_with_arguments_of_their_own_are_refused():
    theirs = timm.create_model("convnext_atto", patch_size=2).eval()
    with pytest.raises(UnsupportedError, match="arguments that ours does not have"):
        backbones.reparameterize(theirs)


@pytest.mark.parametrize("name", ["repvit_m1", "mobileone_s1", "fastvit_t8", "resnet18"])
def test_other_models_of_timm_go_through_timms_hooks(name):
    theirs = timm.create_model(name, num_classes=4).eval()
    merged, report = reparameterize_with_report(theirs)
    assert report.entries[1] < report.entries[0] and report.largest_difference < 1e-10
    left = [m for m in merged.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(left) < 3
    with torch.no_grad():
        expected = theirs(image(224))
        assert (merged(image(224)) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_models_of_timm_are_created_in_deploy_form():
    model = backbones.create_model("resnet18", num_classes=4, deploy=True)
    assert not model.training
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_pairs_that_only_look_like_neighbors_are_not_folded():
    class Crossed(nn.Module):
        """The norm is defined after the convolution and runs before it."""

        pretrained_cfg = {"input_size": (3, 8, 8)}

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm = nn.BatchNorm2d(3)
            self.conv2 = nn.Conv2d(3, 5, 1)
            self.norm2 = nn.BatchNorm2d(5)

        def forward(self, x):
            return self.norm2(self.conv2(self.conv(self.norm(x))))

    model = randomize(Crossed()).eval()
    merged, report = reparameterize_with_report(model)
    assert isinstance(merged.norm, nn.BatchNorm2d) and isinstance(merged.norm2, nn.Identity)
    assert report.merges == {"norm into the linear layer before": 1}


def test_the_command_line_writes_the_deploy_form(tmp_path, capsys):
    source = backbones.save_checkpoint(
        make("cpubone_nano"), tmp_path / "in.safetensors", classes=list("abcd"), license="mit"
    )
    target = tmp_path / "out.safetensors"
    assert main(["reparam", str(source), str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["merges"]["norm into the linear layer before"] == 16
    assert report["largest_difference"] < 1e-10
    assert report["operations"][1] < report["operations"][0]
    ours = read_metadata(target)["backbones"]
    assert (ours["deploy"], ours["classes"], ours["license"]) == (True, list("abcd"), "mit")
    model = backbones.create_model("cpubone_nano", deploy=True, checkpoint_path=target)
    assert model.num_classes == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.safetensors", "out.safetensors"], "no such file"),
        (["deploy.safetensors", "out.safetensors"], "re-parameterized already"),
        (["training.safetensors", "training.safetensors"], "would replace its own source"),
        (["bare.pth", "out.safetensors"], "add --name NAME"),
        (["training.safetensors", "out.pth"], r"\*.safetensors"),
    ],
)
def test_bad_input_on_the_command_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make("convnext_atto")
    backbones.save_checkpoint(model, "training.safetensors")
    backbones.save_checkpoint(backbones.reparameterize(model), "deploy.safetensors")
    torch.save(model.state_dict(), "bare.pth")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["reparam", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
