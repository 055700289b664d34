"""Files of an export appear all together or not at all."""

import os

import pytest
from backbones.engines.placement import put_in_place


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "m.xml").write_text("new graph")
    (folder / "m.bin").write_text("new weights")
    return folder / "m.xml", tmp_path / "m.xml"


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def test_all_files_move(finished, tmp_path):
    file, path = finished
    assert put_in_place(file, path) == len("new graph") + len("new weights")
    assert contents(tmp_path) == {"m.xml": "new graph", "m.bin": "new weights"}


@pytest.mark.parametrize("fails_at", ["m.bin", "m.xml"])
@pytest.mark.parametrize("old", [{}, {"m.xml": "old graph", "m.bin": "old weights"}], ids=len)
def test_what_was_there_is_there_again_when_a_move_fails(
    finished, tmp_path, monkeypatch, old, fails_at
):
    file, path = finished
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    move = os.replace

    def replace(source, place):
        if str(source).endswith(f"work/{fails_at}"):
            raise OSError(28, "No space left on device")
        move(source, place)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        put_in_place(file, path)
    assert contents(tmp_path) == old
