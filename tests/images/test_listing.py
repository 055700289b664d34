"""Which files of a folder or archive are images, and of which class and split."""

import io
import tarfile

import pytest
from PIL import Image

from backbones import train
from backbones.errors import DataError
from backbones.images import list_images
from backbones.train import TrainConfig, open_splits


def write(root, *paths, size=(6, 4)):
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in (".txt", ".json", ".db", ".csv", ""):
            file.write_text("x")
        else:
            Image.new("RGB", size, (90, 20, 200)).save(file)
    return root


def splits(root, **options):
    return open_splits(TrainConfig(data_dir=str(root), model="convnext_atto", **options))


def numbered(folder, count=3, suffix="png"):
    return [f"{folder}/{i}.{suffix}" for i in range(count)]


def archive(folder, path, prefix=""):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=prefix or ".")
    return path


def test_the_class_is_the_first_folder_whatever_lies_deeper(tmp_path):
    deep = [*numbered("train/cat/cam1"), *numbered("train/cat/cam2/night"), *numbered("train/dog")]
    found = splits(write(tmp_path, *deep, *numbered("train/cat/from_web"), *numbered("val/dog/a")))
    assert found.classes == ["cat", "dog"]
    assert [sum(label == i for _, label in found.train.samples) for i in (0, 1)] == [9, 3]
    assert {label for _, label in found.val.samples} == {1}


def test_hidden_and_machine_made_names_are_neither_images_nor_classes(tmp_path):
    write(tmp_path, *numbered("a"), *numbered("b"), "a/._0.png", ".ipynb_checkpoints/0.png")
    write(tmp_path, "a/@eaDir/0.png", "__MACOSX/a/0.png", "b/.thumbs/0.png", "b/Thumbs.db")
    found = splits(tmp_path, val_split="")
    assert found.classes == ["a", "b"]
    assert len(found.train) == 6
    (note,) = found.notes
    assert "6 hidden or machine-made left out" in note
    assert "__MACOSX/" in note


@pytest.mark.parametrize(
    "suffix", ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "ppm", "WebP"]
)
def test_every_format_of_pillow_counts(tmp_path, suffix):
    if "." + suffix.lower() not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not read {suffix}")
    write(tmp_path, *numbered("a", 2), *numbered("b", 3, suffix))
    assert len(splits(tmp_path, val_split="").train) == 5


def test_files_of_other_kinds_are_counted_and_named_once(tmp_path):
    write(tmp_path, *numbered("a"), *numbered("b"), *numbered("a", 12, "txt"), "b/x.JSON", "b/y")
    (note,) = splits(tmp_path, val_split="").notes
    assert note == "14 files of other kinds left out: .txt 12, .json 1, no suffix 1"


def test_order_is_natural_as_in_timm(tmp_path):
    found = list_images(
        write(tmp_path, "b10/1.png", "b9/10.png", "b9/9.png", "B1/0.png", "c/1²2.png")
    )
    assert found.folders == ("B1", "b9", "b10", "c")
    assert found.paths == ("B1/0.png", "b9/9.png", "b9/10.png", "b10/1.png", "c/1²2.png")


def test_a_link_to_a_folder_above_does_not_go_round(tmp_path):
    write(tmp_path, *numbered("a"), *numbered("b"))
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert len(list_images(tmp_path)) == 6


# Class maps.


@pytest.mark.parametrize(
    "text", ["b\na\n", "\ufeffb\na\n", "b\r\na\r\n", "\nb\n\n  a  \n\n"], ids=str.encode
)
def test_class_maps_as_editors_write_them(tmp_path, text):
    write(tmp_path / "data", *numbered("a"), *numbered("b", 2))
    (tmp_path / "map.txt").write_bytes(text.encode())
    found = splits(tmp_path / "data", class_map=str(tmp_path / "map.txt"), val_split="")
    assert found.classes == ["b", "a"]
    assert [label for _, label in found.train.samples] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nbb\n", "lines without a folder of images: bb; folders without a line: b"),
        ("a\n", "folders without a line: b"),
        ("a\nb\nc\n", "lines without a folder of images: c"),
        ("a\nb\na\n", "a stands there twice"),
    ],
    ids=["typo", "missing", "more", "twice"],
)
def test_class_maps_that_do_not_fit(tmp_path, text, words):
    write(tmp_path / "data", *numbered("a"), *numbered("b"))
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        splits(tmp_path / "data", class_map=str(tmp_path / "map.txt"))


def test_a_class_map_that_is_none(tmp_path):
    write(tmp_path / "data", *numbered("a"), *numbered("b"))
    with pytest.raises(DataError, match=r"no\.txt: No such file"):
        splits(tmp_path / "data", class_map="no.txt")
    with pytest.raises(DataError, match="not a text file"):
        (tmp_path / "map.pkl").write_bytes(b"\x80\x04\x95")
        splits(tmp_path / "data", class_map=str(tmp_path / "map.pkl"))


# Splits.


def two_splits(root, *names):
    return write(root, *(p for name in names for c in "ab" for p in numbered(f"{name}/{c}")))


@pytest.mark.parametrize("split", [None, "tset", "validation"])
def test_a_missing_split_is_named_with_those_that_are_there(tmp_path, split):
    two_splits(tmp_path, "train", "test")
    with pytest.raises(DataError, match=r"no split '\w+'; it holds test, train"):
        train.validate(lambda x: x, tmp_path, {"input_size": (3, 8, 8)}, split=split)


def test_a_split_that_is_asked_for_where_there_are_none(tmp_path):
    write(tmp_path, *numbered("a"), *numbered("b"))
    with pytest.raises(DataError, match=r"no split 'val', and none at all; its folders are a, b"):
        train.validate(lambda x: x, tmp_path, {"input_size": (3, 8, 8)}, split="val")


@pytest.mark.parametrize("options", [{"train_split": "trian"}, {"val_split": "vla"}])
def test_training_asks_for_the_splits_that_it_was_given(tmp_path, options):
    with pytest.raises(DataError, match=r"no split '(trian|vla)'; it holds train, val"):
        splits(two_splits(tmp_path, "train", "val"), **options)


def test_splits_in_other_cases_of_letters_are_no_classes(tmp_path):
    found = splits(two_splits(tmp_path, "Train", "VAL", "test"))
    assert found.classes == ["a", "b"]
    assert (len(found.train), len(found.val)) == (6, 6)
    assert found.notes == (f"not used: test in {tmp_path}",)


def test_a_class_may_be_called_as_a_split(tmp_path):
    found = splits(write(tmp_path, *numbered("bus"), *numbered("car"), *numbered("train")))
    assert found.classes == ["bus", "car", "train"]


def test_images_of_splits_without_classes_are_refused(tmp_path):
    with pytest.raises(DataError, match="images outside of class folders"):
        splits(write(tmp_path, *numbered("train"), *numbered("val")))


def test_one_image_a_class_cannot_be_held_out_from(tmp_path):
    with pytest.raises(DataError, match=r"one image a class.*--val-split ''"):
        splits(write(tmp_path, "a/0.png", "b/0.png"))
    assert len(splits(tmp_path, val_split="").train) == 2


# Archives.


@pytest.mark.parametrize("prefix", ["", "flowers", "x/flowers"])
def test_an_archive_is_held_out_from_like_its_folder(tmp_path, prefix):
    write(tmp_path / "f", *numbered("a", 10), *numbered("b/deep", 10), "a/._0.png", "b/n.txt")
    folder, tar = (
        splits(tmp_path / "f"),
        splits(archive(tmp_path / "f", tmp_path / "f.tar", prefix)),
    )
    assert tar.classes == folder.classes == ["a", "b"]
    assert tar.val.samples == folder.val.samples
    assert tar.train.samples == folder.train.samples
    assert tar.notes[:2] == folder.notes[:2]
    assert tar.train[0][0].tobytes() == folder.train[0][0].tobytes()


def test_the_splits_of_an_archive_are_used(tmp_path):
    two_splits(tmp_path / "f", "train", "val")
    found = splits(archive(tmp_path / "f", tmp_path / "f.tar", "flowers"))
    assert found.classes == ["a", "b"]
    assert found.val.place == tmp_path / "f.tar" / "flowers" / "val"
    with pytest.raises(DataError, match="no split 'tset'; it holds train, val"):
        train.validate(lambda x: x, tmp_path / "f.tar", {"input_size": (3, 8, 8)}, split="tset")


def test_archives_in_an_archive_are_folders(tmp_path):
    write(tmp_path / "f", *numbered("a"), *numbered("b", 4))
    (tmp_path / "g").mkdir()
    for name in "ab":
        with tarfile.open(tmp_path / "g" / f"{name}.tar", "w") as tar:
            for path in sorted((tmp_path / "f" / name).iterdir()):
                tar.add(path, arcname=path.name)
    found = splits(archive(tmp_path / "g", tmp_path / "g.tar"), val_fraction=0)
    assert found.classes == ["a", "b"]
    assert found.val is None
    assert [label for _, label in found.train.samples] == [0] * 3 + [1] * 4
    assert found.train[6][0].size == (6, 4)


def test_archives_that_cannot_be_used(tmp_path):
    write(tmp_path / "f", *numbered("a"), *numbered("b"))
    with tarfile.open(tmp_path / "f.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "f", arcname=".")
    with pytest.raises(DataError, match=r"uncompressed tar archive .* unpack it"):
        splits(tmp_path / "f.tar.gz")
    whole = archive(tmp_path / "f", tmp_path / "f.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last = max(member.offset_data + member.size for member in tar)
    (tmp_path / "cut.tar").write_bytes(whole[: last - 9])
    with pytest.raises(DataError, match="cut short|whole"):
        splits(tmp_path / "cut.tar")
