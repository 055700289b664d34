"""What a file says of its model is checked before anything is allocated or built."""

from __future__ import annotations

import json
import time

import pytest
import safetensors.torch
import torch

import backbones
from backbones.errors import CheckpointError


def described(path, name, arguments, tensors=None):
    facts = {"backbones": json.dumps({"name": name, "arguments": arguments})}
    safetensors.torch.save_file(tensors or {"a": torch.zeros(4)}, path, facts)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": [1 << 20] * 4, "depths": [0, 0, 1, 0]}, "a model of [0-9]+ numbers and holds 4"),
        ({"depths": [200_000, 1, 1, 1], "dims": [8, 8, 8, 8]}, "a model of 200003 blocks"),
        ({"depths": [0, 0, 1, 0], "dims": [8] * 4, "num_classes": 1 << 40}, "a model of"),
        ({"no_such_argument": 1}, "describes no ConvNeXt"),
        ({"depths": "x", "dims": None}, "describes no ConvNeXt"),
        ({"depths": [1, 0], "dims": [-8, 8]}, "describes no ConvNeXt"),
        ({"dims": [8] * 4, "depths": [0, 0, 1, 0], "kernel_sizes": 1 << 25}, "describes"),
    ],
    ids=["wide", "deep", "classes", "unknown", "types", "negative", "kernel"],
)
def test_impossible_models_are_refused_at_once(tmp_path, arguments, message):
    path = described(tmp_path / "mine.safetensors", "convnext_atto", arguments)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        backbones.create_model("convnext_atto", checkpoint_path=path)
    assert str(path) in str(caught.value)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("name", ["convnext_atto", "lsnet_t", "unireplknet_a", "spartan_t"])
def test_our_own_files_pass(tmp_path, name):
    model = backbones.create_model(name, num_classes=3, deploy=True)
    path = backbones.save_checkpoint(model, tmp_path / "mine.safetensors")
    again = backbones.create_model(name, checkpoint_path=path, deploy=True)
    assert all(torch.equal(value, again.state_dict()[k]) for k, value in model.state_dict().items())
