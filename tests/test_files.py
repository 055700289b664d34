"""Files and folders appear whole or not at all, and what was there before stays until then."""

import json
import os
from pathlib import Path

import pytest

from backbones.files import new_bundle, new_file, new_folder, write_json, write_text

NEW = {"m.xml": "new graph", "m.bin": "new weights"}


def contents(folder):
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def fill(folder):
    for name, text in NEW.items():
        (folder / name).write_text(text)


def test_all_files_move(tmp_path):
    with new_file(tmp_path / "m.xml") as file:
        fill(file.parent)
        assert contents_of_others(tmp_path, file.parent) == {}
    assert contents(tmp_path) == NEW


def contents_of_others(folder, hidden):
    return {p.name: p.read_text() for p in folder.iterdir() if p != hidden}


@pytest.mark.parametrize("fails_at", ["m.bin", "m.xml"])
@pytest.mark.parametrize("old", [{}, {"m.xml": "old graph", "m.bin": "old weights"}], ids=len)
@pytest.mark.parametrize("place", [new_file, new_folder])
def test_what_was_there_is_there_again_when_a_move_fails(
    tmp_path, monkeypatch, old, fails_at, place
):
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    move = os.replace

    def replace(source, target):
        if str(source).endswith(f".tmp/{fails_at}"):
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with (
        pytest.raises(OSError, match="No space"),
        place(tmp_path / "m.xml" if place is new_file else tmp_path) as given,
    ):
        fill(given.parent if place is new_file else given)
    assert contents(tmp_path) == old


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    (tmp_path / "m.xml").write_text("old graph")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "m.xml") as file:
        fill(file.parent)
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "model") as folder:
        fill(folder)
        raise ZeroDivisionError
    assert contents(tmp_path) == {"m.xml": "old graph"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.xml"]


def test_a_new_folder_appears_as_a_whole(tmp_path):
    with new_folder(tmp_path / "model") as folder:
        fill(folder)
        assert not (tmp_path / "model").exists()
    assert contents(tmp_path / "model") == NEW


def test_a_folder_that_exists_gets_the_files_and_keeps_its_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "m.xml").write_text("old graph")
    with new_folder(tmp_path) as folder:
        fill(folder)
    assert contents(tmp_path) == {**NEW, "notes.txt": "mine"}


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_bundle_is_replaced_as_a_whole(tmp_path, old):
    path = tmp_path / "m.bundle"
    if old:
        path.mkdir()
        (path / "old.txt").write_text("of another")
    with new_bundle(path) as bundle:
        assert bundle.name == "m.bundle"
        (bundle / "deep").mkdir(parents=True)
        (bundle / "deep" / "a.txt").write_text("new")
        assert path.exists() == old
    assert [p.relative_to(path).as_posix() for p in sorted(path.rglob("*"))] == [
        "deep",
        "deep/a.txt",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["m.bundle"]


@pytest.mark.parametrize("at_the_move", [False, True], ids=["in the block", "at the move"])
def test_a_bundle_that_fails_leaves_the_old_one(tmp_path, monkeypatch, at_the_move):
    path = tmp_path / "m.bundle"
    path.mkdir()
    (path / "old.txt").write_text("old")
    rename = Path.rename

    def fail(self, target):
        if self.name == "m.bundle" and self.parent.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    if at_the_move:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"), new_bundle(path) as bundle:
        bundle.mkdir()
        (bundle / "a.txt").write_text("new")
        if not at_the_move:
            raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["m.bundle"]
    assert contents(path) == {"old.txt": "old"}


def test_what_is_written_is_flushed_first(tmp_path, monkeypatch):
    """A power cut after the move must not leave an empty file under the name."""
    order = []
    flush, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda stream: order.append("flush") or flush(stream))
    monkeypatch.setattr(os, "replace", lambda *pair: order.append("move") or move(*pair))
    write_text(tmp_path / "a.txt", "ä")
    assert order[:2] == ["flush", "move"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ä"


def test_json(tmp_path):
    path = write_json(tmp_path / "a.json", {"b": [1, 2]})
    assert json.loads(path.read_text()) == {"b": [1, 2]}


def test_impossible_places_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"), new_file(tmp_path / "folder"):
        pass
    with pytest.raises(FileNotFoundError, match="none"), new_file(tmp_path / "none" / "a.txt"):
        pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file"), new_bundle(tmp_path / "file"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
