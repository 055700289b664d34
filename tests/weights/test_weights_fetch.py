"""Pretrained weights through a real hub client against a server on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap

import pytest
from loopback_hub import COMMIT, serve

import backbones
from backbones import weights
from backbones.errors import CheckpointError, WeightsUnavailableError
from backbones.manifest import WeightsEntry

VARIANT = "inception_next_atto"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with the weights of the smallest model whose default tag is timm's."""
    folder = tmp_path_factory.mktemp("hub")
    repo = folder / "timm" / f"{VARIANT}.sail_in1k"
    repo.mkdir(parents=True)
    model = backbones.create_model(VARIANT)
    weights.save_checkpoint(model, repo / "model.safetensors")
    with serve(folder) as server:
        yield server


def run(hub, cache, program, **environment):
    """Run a program in a process whose Hub is the given server."""
    settings = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(cache), **environment}
    settings["HF_HUB_OFFLINE"] = environment.get("HF_HUB_OFFLINE", "0")
    settings["HF_HUB_DISABLE_XET"] = "1"
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=settings,
    )


LOAD = f"""
    import backbones, timm, torch
    from pathlib import Path
    import os
    model = backbones.create_model("{VARIANT}", pretrained=True)
    file = next(Path(os.environ["HF_HOME"]).rglob("model.safetensors"))
    saved = backbones.create_model("{VARIANT}", checkpoint_path=file)
    def same(a, b):
        return all(torch.equal(a.state_dict()[k], b.state_dict()[k]) for k in b.state_dict())
    assert same(model, saved)
    by_timm = timm.create_model("backbones_{VARIANT}", pretrained=True)
    assert same(by_timm, saved)
    adapted = backbones.create_model(
        "{VARIANT}.sail_in1k", pretrained=True, num_classes=4, in_chans=1
    )
    assert torch.allclose(adapted.stem[0].weight, saved.stem[0].weight.sum(1, keepdim=True))
    assert adapted.get_classifier().out_features == 4
    maps = backbones.create_model(
        "{VARIANT}", pretrained=True, features_only=True, out_indices=(0, 1)
    )
    assert torch.equal(maps.model.stem[0].weight, saved.stem[0].weight)
    print("loaded", file)
"""


def test_pretrained_weights_arrive_by_every_road_and_offline_from_the_cache(hub, tmp_path):
    first = run(hub, tmp_path, LOAD)
    assert first.returncode == 0, first.stderr
    assert COMMIT in first.stdout
    assert "no digest is recorded" in first.stderr
    assert first.stderr.count("no digest") == 1
    seen = len(hub.requests)
    offline = run(hub, tmp_path, LOAD, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == seen


def test_a_file_the_hub_does_not_have(hub, tmp_path):
    program = """
        import backbones
        try:
            backbones.create_model("inception_next_tiny", pretrained=True)
        except FileNotFoundError as error:
            print(type(error).__name__, error)
    """
    result = run(hub, tmp_path, program)
    assert result.stdout.startswith("WeightsUnavailableError model.safetensors of timm/inception")
    assert "checkpoint_path" in result.stdout


def test_hub_models_of_ours_and_of_timm(hub, tmp_path):
    import timm

    repo = hub.folder / "me" / "mine"
    model = backbones.create_model("convnext_atto", num_classes=5)
    timm.models.save_for_hf(model, repo, model_args={"num_classes": 5}, safe_serialization=True)
    program = """
        import backbones, timm
        ours = backbones.create_model("hf-hub:me/mine", pretrained=True)
        assert type(ours).__module__ == "backbones.families.convnext"
        assert ours.num_classes == 5
        assert type(timm.create_model("hf-hub:me/mine", pretrained=True)) is type(ours)
        print(float(ours.stem[0].weight.sum()))
    """
    result = run(hub, tmp_path, program)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(model.stem[0].weight.sum().item(), rel=1e-5)


@pytest.fixture
def plain(hub, tmp_path):
    """A direct URL of the same file, and its digest."""
    path = hub.folder / "timm" / f"{VARIANT}.sail_in1k" / "model.safetensors"
    content = path.read_bytes()
    entry = {"variant": VARIANT, "tag": "t", "where": "", "license": "mit"}
    entry["url"] = f"{hub.address}/timm/{VARIANT}.sail_in1k/model.safetensors"
    return entry, hashlib.sha256(content).hexdigest(), len(content)


def test_direct_url_is_verified_and_kept(plain, hub, tmp_path):
    entry, digest, size = plain
    pinned = WeightsEntry(**entry, sha256=digest, size=size)
    path = weights.fetch(pinned, cache_dir=tmp_path)
    assert path.stat().st_size == size
    seen = len(hub.requests)
    assert weights.fetch(pinned, cache_dir=tmp_path) == path
    assert len(hub.requests) == seen


def test_wrong_digest_or_size_is_refused_and_leaves_nothing(plain, tmp_path):
    entry, digest, size = plain
    wrong = "0" * 64
    with pytest.raises(CheckpointError, match=f'invalid hash value .*"{wrong}", got "{digest}"'):
        weights.fetch(WeightsEntry(**entry, sha256=wrong), cache_dir=tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    path = weights.fetch(WeightsEntry(**entry), cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=f"{size} bytes, but .* has 7"):
        weights.fetch(WeightsEntry(**entry, size=7), cache_dir=tmp_path)
    path.write_bytes(b"tampered" * 9)
    with pytest.raises(CheckpointError, match=f"but .* has {digest}"):
        weights.fetch(WeightsEntry(**entry, sha256=digest), cache_dir=tmp_path)


def test_unreachable_url(plain, tmp_path):
    entry, _, _ = plain
    entry["url"] = "http://127.0.0.1:9/weights.pth"
    with pytest.raises(WeightsUnavailableError, match=r"cannot be downloaded from http://127"):
        weights.fetch(WeightsEntry(**entry), cache_dir=tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    ("status", "message"),
    [("page_only", "visit https://example.org"), ("unreleased", "were never released")],
)
def test_weights_that_no_program_can_fetch(status, message):
    entry = WeightsEntry("m", "t", "", status=status, page="https://example.org", layout="authors")
    with pytest.raises(WeightsUnavailableError, match=message) as caught:
        weights.fetch(entry)
    assert "checkpoint_path=" in str(caught.value)
