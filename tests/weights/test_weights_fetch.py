"""Pretrained weights through a real hub client against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
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


WRAPPER = json.dumps(
    {
        "architecture": "convnext_atto",
        "model_args": None,
        "model_type": "timm_wrapper",
        "num_classes": 5,
    }
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


def test_hub_models_of_ours_and_of_timm(hub, tmp_path):
    import timm

    repo = hub.folder / "me" / "mine"
    model = backbones.create_model("convnext_atto", num_classes=5)
    timm.models.save_for_hf(model, repo, model_args={"num_classes": 5}, safe_serialization=True)
    program = """
        import backbones, timm
        ours = backbones.create_model("hf-hub:me/mine", pretrained=True)
        assert type(ours).__module__ == "backbones.families.convnext.model"
        assert ours.num_classes == 5
        assert type(timm.create_model("hf-hub:me/mine", pretrained=True)) is type(ours)
        print(float(ours.stem[0].weight.sum()))
    """
    result = run(hub, tmp_path, program)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(model.stem[0].weight.sum().item(), rel=1e-5)


def test_repositories_that_transformers_wrote(hub, tmp_path):
    """timm's models in transformers' wrapper load; what is no model of timm is refused."""
    model = backbones.create_model("convnext_atto", num_classes=5)
    for name, config in (("theirs", '{"model_type": "convnext"}'), ("wrapped", WRAPPER)):
        repo = hub.folder / "me" / name
        repo.mkdir(parents=True)
        (repo / "config.json").write_text(config)
        state = {f"timm_model.{key}": value for key, value in model.state_dict().items()}
        safetensors.torch.save_file(state, repo / "model.safetensors")
    program = """
        import backbones
        model = backbones.create_model("hf-hub:me/wrapped", pretrained=True)
        print(float(model.stem[0].weight.sum()))
        backbones.create_model("hf-hub:me/theirs", pretrained=True)
    """
    result = run(hub, tmp_path, program)
    assert "ConfigError: hf-hub:me/theirs: its config.json describes no model of timm" in (
        result.stderr
    )
    assert "use local-dir:FOLDER" in result.stderr
    assert float(result.stdout) == pytest.approx(float(model.stem[0].weight.sum()), rel=1e-4)


CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def entry(**facts):
    return WeightsEntry("m", "t", "", **{"repo": "me/mine", "file": "w.pth", **facts})


@pytest.mark.parametrize("place", ["m.t/w.pth", "me/mine/w.pth", "m.t.safetensors", "m.t.pth"])
def test_a_local_mirror_comes_before_the_network(tmp_path, monkeypatch, place):
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path))
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    assert weights.fetch(entry(sha256=DIGEST)) == path
    assert weights.fetch(entry()) == path
    with pytest.raises(CheckpointError, match=f"sha256 {DIGEST}, but m.t has {'0' * 64}"):
        weights.fetch(entry(sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"7000 bytes, but m.t has 7"):
        weights.fetch(entry(size=7))
    assert path.read_bytes() == CONTENT


def test_a_mirror_holds_files_that_no_program_can_fetch(tmp_path, monkeypatch):
    page = entry(repo=None, file=None, status="page_only", page="https://example.org")
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(WeightsUnavailableError, match=r"visit https://example\.org"):
        weights.fetch(page)
    (tmp_path / "m.t.pth").write_bytes(CONTENT)
    assert weights.fetch(page).read_bytes() == CONTENT


def test_a_mirror_that_is_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path / "gone"))
    with pytest.raises(WeightsUnavailableError, match="BACKBONES_WEIGHTS_DIR=.*gone is no folder"):
        weights.fetch(entry())


@pytest.mark.parametrize("value", ["1", "true"])
def test_a_digest_can_be_required(tmp_path, monkeypatch, value):
    monkeypatch.setenv("BACKBONES_REQUIRE_DIGEST", value)
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path))
    (tmp_path / "m.t.pth").write_bytes(CONTENT)
    with pytest.raises(CheckpointError, match=r"'backbones weights lock m\.t'"):
        weights.fetch(entry())
    assert weights.fetch(entry(sha256=DIGEST)).is_file()
    monkeypatch.setenv("BACKBONES_REQUIRE_DIGEST", "0")
    assert weights.fetch(entry()).is_file()
    monkeypatch.setenv("BACKBONES_REQUIRE_DIGEST", value)
    with pytest.raises(CheckpointError, match="only files of the weights manifest have digests"):
        backbones.registry.build(
            backbones.registry.registry.variants[VARIANT],
            True,
            pretrained_cfg={"hf_hub_id": "me/mine"},
        )


def test_one_warning_names_the_command_that_pins(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path))
    (tmp_path / "m.t2.pth").write_bytes(CONTENT)
    unpinned = WeightsEntry("m", "t2", "", repo="me/mine", file="w.pth")
    for _ in range(3):
        weights.fetch(unpinned)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "'backbones weights lock m.t2' records it" in caplog.text


def test_names_from_addresses_are_file_names(tmp_path):
    odd = WeightsEntry("m", "t", "", url="https://example.org/a/%2e%2e%2fb?x=../c")
    assert weights.local_copy(odd, tmp_path) is None
    from backbones.weights.download.fetching import mirror_path

    assert mirror_path(odd, tmp_path) == tmp_path / "m.t" / "b"


@pytest.mark.parametrize(
    ("status", "message"),
    [("page_only", "visit https://example.org"), ("unreleased", "were never released")],
)
def test_weights_that_no_program_can_fetch(status, message):
    entry = WeightsEntry("m", "t", "", status=status, page="https://example.org", layout="authors")
    with pytest.raises(WeightsUnavailableError, match=message) as caught:
        weights.fetch(entry)
    assert "checkpoint_path=" in str(caught.value)
