"""A little of everything for the smallest member of every family, on the core's own packages.

``pytest -m smoke`` is what runs with the lowest versions that pyproject.toml declares; it needs
the extra ``onnx`` and pytest, and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from damping import damp
from randomized import randomize
from tiers import parameters_of, shallow, smallest_of_each_family, smallest_size

import backbones

pytestmark = pytest.mark.smoke
FAMILIES = pytest.mark.parametrize("name", smallest_of_each_family())
# The default tier asks the same of more models, in other files; by this mark it leaves these out.
ELSEWHERE = pytest.mark.slow


def arguments_of(name):
    return {**shallow(name, blocks=1), "num_classes": 7}


@cache
def model_of(name):
    """A model in eval mode, not to be changed, whose every weight counts."""
    torch.manual_seed(0)
    model = backbones.create_model(name, **arguments_of(name)).eval()
    return damp(randomize(model), name)


def images_for(model, batch):
    side = smallest_size(model)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


def assert_close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@ELSEWHERE
@FAMILIES
@torch.no_grad()
def test_create(name):
    model = backbones.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters_of(name)
    logits = model(images_for(model, 1))
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()


@ELSEWHERE
@FAMILIES
@torch.no_grad()
def test_features(name):
    model = backbones.create_model(name, **shallow(name), features_only=True).eval()
    side = 2 * max(model.feature_info.reduction())
    maps = model(torch.randn(1, 3, side, side))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [side // m.shape[-1] for m in maps] == model.feature_info.reduction()


@ELSEWHERE
@FAMILIES
def test_backward(name):
    model = backbones.create_model(name, **arguments_of(name)).train()
    side = 2 * smallest_size(model)  # batch norm needs more than one value a channel
    model(torch.randn(2, 3, side, side)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@ELSEWHERE
@FAMILIES
@torch.no_grad()
def test_reparameterize(name):
    model = model_of(name)
    merged = backbones.reparameterize(model)
    assert len(merged.state_dict()) < len(model.state_dict())
    images = images_for(model, 2)
    assert_close(merged(images), model(images))


@ELSEWHERE
@FAMILIES
@torch.no_grad()
def test_save_and_load(name, tmp_path):
    model = model_of(name)
    path = backbones.save_checkpoint(model, tmp_path / "m.safetensors")
    loaded = backbones.create_model(name, **arguments_of(name), checkpoint_path=path).eval()
    images = images_for(model, 2)
    assert torch.equal(loaded(images), model(images))


@ELSEWHERE
@FAMILIES
@pytest.mark.parametrize("deploy", [False, True], ids=["training-form", "deploy-form"])
@torch.no_grad()
def test_torch_export(name, deploy):
    model = model_of(name)
    if deploy:
        model = backbones.reparameterize(model)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images_for(model, 2),), dynamic_shapes=(batch,))
    for size in (1, 3):
        images = images_for(model, size)
        assert_close(program.module()(images), model(images))


@FAMILIES
def test_onnx(name, tmp_path):
    model = model_of(name)
    side = smallest_size(model)
    report = backbones.export(model, tmp_path / "m.onnx", input_size=(3, side, side))
    assert report.engine == "onnxruntime"
    assert [check.shape[0] for check in report.checks] == [1, 5]
    assert all(check.agreement.relative_error < 1e-4 for check in report.checks)


def test_command():
    command = [sys.executable, "-m", "backbones", "list", "--json"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(listed) == backbones.list_models()
