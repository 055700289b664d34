"""What may be given as images, and in which order they come."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from collections_of_images import picture, write_pictures
from PIL import Image

from backbones.errors import DataError
from backbones.inference import open_source


def names(source):
    return [item.name for item in open_source(source)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return folder, [str(path) for path in write_pictures(folder, 12)]


def test_folder_file_and_pattern(photos):
    folder, paths = photos
    assert names(folder) == names(str(folder)) == paths
    assert names(paths[3]) == [paths[3]]
    assert sorted(names(f"{folder}/*/*.png")) == sorted(paths)
    assert names([paths[5], folder / "ant"])[0] == paths[5]
    assert {item.folder for item in open_source(folder)} == {"ant", "bee"}


def test_lists(photos, tmp_path, monkeypatch):
    folder, paths = photos
    text = tmp_path / "list.txt"
    text.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*paths[:3], "", ""]).encode())
    assert names(text) == paths[:3]
    table = tmp_path / "list.csv"
    table.write_text("label,filename\nant," + "\nant,".join(paths[:2]) + "\n")
    assert names(table) == paths[:2]
    bare = tmp_path / "bare.csv"
    bare.write_text("\n".join(paths[:2]))
    assert names(bare) == paths[:2]
    beside = folder / "beside.txt"  # paths of the list's own folder
    beside.write_text("ant/0.png\nant/1.png\n")
    assert [Image.open(name).size for name in names(beside)] == [(56, 40)] * 2
    beside.unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(paths[:4])))
    assert names("-") == paths[:4]


def make_shard(path, numbers):
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            content = io.BytesIO()
            picture(i).save(content, "PNG")
            for name, data in ((f"{i:03}.png", content.getvalue()), (f"{i:03}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_shards(tmp_path):
    make_shard(tmp_path / "s-08.tar", range(3))
    make_shard(tmp_path / "s-09.tar", range(3, 5))
    make_shard(tmp_path / "s-10.tar", range(5, 7))
    source = open_source(f"{tmp_path}/s-{{08..10}}.tar")
    assert [item.name.rsplit("/", 1)[1] for item in source] == [f"{i:03}.png" for i in range(7)]
    assert source[4].open("RGB").tobytes() == picture(4).tobytes()
    assert any(".cls 3" in line for line in source.left_out)
    with pytest.raises(DataError, match=r"s-11\.tar: no such file"):
        open_source(f"{tmp_path}/s-{{08..11}}.tar")
    whole = (tmp_path / "s-08.tar").read_bytes()
    (tmp_path / "s-08.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="s-08"):
        open_source(f"{tmp_path}/s-*.tar")


def test_images_in_memory():
    array = np.asarray(picture(1))
    source = open_source([picture(0), array, array[..., :1], array[..., 0]])
    assert [item.name for item in source] == ["0", "1", "2", "3"]
    assert source[1].open("RGB").tobytes() == picture(1).tobytes()
    assert source[2].open("L").tobytes() == source[3].open("L").tobytes()
    stream = open_source(picture(i) for i in range(3))
    assert next(iter(stream)).open("RGB").tobytes() == picture(0).tobytes()
    turned = picture(2)
    turned.getexif()[0x0112] = 6
    content = io.BytesIO()
    turned.save(content, "JPEG", exif=turned.getexif())
    assert open_source([Image.open(content)])[0].open("RGB").size == turned.size[::-1]


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_arrays_that_are_no_images(array):
    with pytest.raises(DataError, match="uint8"):
        open_source([array])[0].open("RGB")


def test_nothing_there(tmp_path):
    for source, message in (
        (tmp_path / "no", "no such file or folder"),
        (f"{tmp_path}/*.png", "nothing has such a name"),
        (tmp_path, "no images in it"),
        ([], "no images in it"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(source)
    with pytest.raises(DataError) as both:
        open_source([tmp_path / "one.png", tmp_path / "two.png"])
    assert "one.png" in str(both.value)
    assert "two.png" in str(both.value)
    text = tmp_path / "list.txt"
    text.write_text("a.png\nb.png\n")
    with pytest.raises(DataError, match=r"none of the 2 files .* such as a\.png"):
        open_source(text)
    text.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(DataError, match="not a text file"):
        open_source(text)
