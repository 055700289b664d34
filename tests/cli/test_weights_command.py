"""``backbones weights list | show | fetch | verify | lock`` against a server on this machine."""

from __future__ import annotations

import hashlib
import json

import pytest
from huggingface_hub import constants
from loopback_hub import COMMIT, serve

from backbones.cli import main
from backbones.manifest import read_manifest
from backbones.weights.download import retrying

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MANIFEST = """# head comment
version: 1
families:
  toy:
    defaults:
      license: mit   # of all
    weights:
      # the first
      toy_a.in1k:
        repo: me/mine
        file: w.pth
        revision: null   # a commit
        sha256: null
        size: null       # bytes
        top1: 71.5
        note: "sha256: not this line"
      toy_a.web:
        url: {address}/me/mine/w.pth
        license: cc-by-nc-4.0
      # between
      toy_b.in1k:
        status: page_only
        page: https://example.org/toy
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    repo = tmp_path / "served/me/mine"
    repo.mkdir(parents=True)
    (repo / "w.pth").write_bytes(CONTENT)
    with serve(tmp_path / "served") as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(retrying, "DELAYS", ())
        yield server


@pytest.fixture
def manifest(hub, tmp_path):
    path = tmp_path / "manifest.yaml"
    path.write_text(MANIFEST.replace("{address}", hub.address))
    return path


@pytest.fixture
def run(manifest, tmp_path, capsys):
    def call(verb, *arguments):
        places = ["--manifest", str(manifest)]
        if verb in ("fetch", "verify", "lock"):
            places += ["--cache-dir", str(tmp_path / "cache")]
        code = main(["weights", verb, *arguments, *places])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_list_filters(run):
    code, out, _ = run("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "toy_a.in1k",
        "toy_a.web",
        "toy_b.in1k",
    ]
    assert "71.5" in out
    assert "hf-hub:me/mine" in out
    assert run("list", "--status", "page_only")[1].startswith("toy_b.in1k")
    assert run("list", "--license", "cc-*")[1].split()[0] == "toy_a.web"
    assert run("list", "--pinned")[1] == ""
    facts = json.loads(run("list", "toy_a", "--json")[1])
    assert [fact["name"] for fact in facts] == ["toy_a.in1k", "toy_a.web"]


def test_show_says_everything(run):
    _, out, _ = run("show", "toy_b")
    assert out.startswith("toy_b.in1k\n")
    assert "page: https://example.org/toy" in out
    assert "status: page_only" in out


def test_unknown_names_are_met_with_the_nearest(run):
    code, _, err = run("show", "toy_a.in1")
    assert code == 2
    assert "no weights 'toy_a.in1'; did you mean 'toy_a.in1k'?" in err


def test_lock_then_fetch_then_verify(run, manifest, tmp_path, hub):
    before = manifest.read_text()
    code, out, _ = run("lock")
    assert code == 0, out
    after = manifest.read_text()
    assert after == before.replace(
        "revision: null   # a commit", f"revision: {COMMIT}   # a commit"
    ).replace("sha256: null", f"sha256: {DIGEST}").replace("size: null ", "size: 7000 ").replace(
        "license: cc-by-nc-4.0\n",
        f"license: cc-by-nc-4.0\n        sha256: {DIGEST}\n        size: 7000\n",
    )
    entries = read_manifest(manifest).entries
    for name in ("toy_a.in1k", "toy_a.web"):
        assert (entries[name].sha256, entries[name].size) == (DIGEST, 7000)
    assert entries["toy_a.in1k"].revision == COMMIT
    assert entries["toy_a.in1k"].note == "sha256: not this line"
    assert entries["toy_b.in1k"].sha256 is None

    seen = len(hub.requests)
    assert run("verify")[:2] == (0, run("verify")[1])
    assert run("verify")[1].count("verified: ") == 2
    code, out, _ = run("fetch", "toy_a")
    assert code == 0
    assert len(hub.requests) == seen, "cached and pinned: no network"
    path = out.splitlines()[0].partition(": ")[2]
    with open(path, "wb") as file:
        file.write(b"x" * 7000)
    code, out, _ = run("verify")
    assert code == 1
    assert f"sha256 {hashlib.sha256(b'x' * 7000).hexdigest()}" in out
    assert DIGEST in out


def test_lock_names_what_it_could_not_reach_and_goes_on(run, manifest, hub):
    (hub.folder / "me/mine/w.pth").rename(hub.folder / "me/mine/other")
    before = manifest.read_bytes()
    code, out, _ = run("lock", "--json")
    assert code == 1
    results = json.loads(out)
    assert "has no file w.pth" in results["toy_a.in1k"]["error"]
    assert "HTTP status 404" in results["toy_a.web"]["error"]
    assert manifest.read_bytes() == before


def test_lock_refuses_a_file_that_is_not_the_recorded_one(run, manifest, hub):
    assert run("lock")[0] == 0
    pinned = manifest.read_bytes()
    (hub.folder / "me/mine/w.pth").write_bytes(CONTENT + b"!")
    run("verify")
    code, out, _ = run("fetch", "toy_a", "--again")
    assert code == 1
    assert out.count("error: ") == 2
    assert run("lock", "toy_a.in1k")[0] in (0, 1)
    assert manifest.read_bytes() == pinned


@pytest.mark.parametrize("style", ["flow", "joined"])
def test_lock_leaves_a_manifest_it_cannot_edit_by_line(run, manifest, style):
    text = manifest.read_text()
    if style == "flow":
        text = text[: text.index("      # the first")] + (
            "      toy_a.in1k: {repo: me/mine, file: w.pth, sha256: null}\n"
        )
    else:
        text = text.replace("sha256: null\n", "sha256:\n          null\n")
    manifest.write_text(text)
    code, out, _ = run("lock", "toy_a.in1k")
    assert code == 1
    assert "toy_a.in1k" in out
    assert manifest.read_text() == text
    assert sorted(p.name for p in manifest.parent.glob(".*")) == []


def test_fetch_fills_a_mirror_folder(run, tmp_path, monkeypatch, hub):
    code, _, _ = run("fetch", "toy_a", "--to", str(tmp_path / "mirror"))
    assert code == 0
    assert (tmp_path / "mirror/toy_a.in1k/w.pth").read_bytes() == CONTENT
    assert (tmp_path / "mirror/toy_a.web/w.pth").read_bytes() == CONTENT
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path / "mirror"))
    seen = len(hub.requests)
    code, out, _ = run("fetch", "toy_a")
    assert code == 0
    assert str(tmp_path / "mirror") in out
    assert len(hub.requests) == seen


def test_fetch_of_what_no_program_can_fetch(run):
    code, out, _ = run("fetch", "toy_b")
    assert code == 1
    assert "visit https://example.org/toy" in out
    code, _, err = run("fetch")
    assert code == 2
    assert "name what to fetch" in err
