"""Images and image folders: what is read, and what is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_model_data_config

import backbones
from backbones.errors import ConfigError, MissingDependencyError
from backbones.train import (
    DataError,
    TrainConfig,
    eval_loader,
    image_folder,
    open_image,
    set_input,
    write_digits,
)
from backbones.train.data import train_loader

DATA_CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def picture(path, size=(20, 10), color=(200, 10, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def noise(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_an_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image = open_image(picture(tmp_path / "a.jpg", exif=exif), "L")
    assert image.size == (10, 20)
    assert image.mode == "L"


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_truncated_images_are_named(tmp_path, suffix):
    path = cut(noise(tmp_path / f"a.{suffix}"))
    with pytest.raises(DataError, match=rf"a\.{suffix}: damaged or cut short"):
        open_image(path)


def test_no_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text\.png: not an image"):
        open_image(tmp_path / "text.png")
    with pytest.raises(DataError, match="nothing.png: no such file"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(DataError, match="a folder"):
        open_image(tmp_path)


def test_a_damaged_training_image_is_an_error_and_not_left_out(tmp_path):
    noise(tmp_path / "train" / "a" / "0.png")
    cut(noise(tmp_path / "train" / "b" / "1.png"))
    dataset = image_folder(tmp_path, "train")
    with pytest.raises(DataError, match=r"1\.png: damaged"):
        list(eval_loader(dataset, DATA_CONFIG))


def test_validation_takes_the_classes_of_training(tmp_path):
    for name in ("ant", "bee", "cat"):
        picture(tmp_path / "train" / name / "0.png")
    picture(tmp_path / "val" / "cat" / "0.png")
    training = image_folder(tmp_path, "train")
    assert training.classes == ["ant", "bee", "cat"]
    validation = image_folder(tmp_path, "val", classes=training.classes)
    assert validation[0][1] == 2
    assert validation.path(0) == tmp_path / "val" / "cat" / "0.png"
    picture(tmp_path / "val" / "dog" / "0.png")
    with pytest.raises(DataError, match="does not have: dog"):
        image_folder(tmp_path, "val", classes=training.classes)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="no split .train., and none at all"):
        image_folder(tmp_path, "train")
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in it"):
        image_folder(tmp_path, "train")


def test_loaders_prepare_as_the_model_asks(tmp_path):
    picture(tmp_path / "train" / "a" / "0.png", color=(255, 255, 255))
    dataset = image_folder(tmp_path, "train")
    images, _ = next(iter(eval_loader(dataset, DATA_CONFIG)))
    assert images.shape == (1, 3, 32, 32)
    assert torch.allclose(images, torch.ones(()))
    # One image fills no batch of 64; the batch shrinks instead of giving none.
    images, _ = next(iter(train_loader(dataset, TrainConfig(), DATA_CONFIG)))
    assert images.shape == (1, 3, 32, 32)


def test_gray_models_get_gray_images(tmp_path):
    picture(tmp_path / "train" / "a" / "0.png")
    config = {**DATA_CONFIG, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    images, _ = next(iter(eval_loader(image_folder(tmp_path, "train", in_chans=1), config)))
    assert images.shape == (1, 1, 32, 32)


def test_set_input_is_what_timm_and_saved_files_state(tmp_path):
    model = backbones.create_model("convnext_atto", num_classes=7)
    set_input(model, 48, crop_pct=1.0)
    config = resolve_model_data_config(model, use_test_size=True)
    assert config["input_size"] == (3, 48, 48)
    assert config["crop_pct"] == 1.0
    backbones.save_checkpoint(model, tmp_path / "m.safetensors")
    saved = backbones.weights.read_metadata(tmp_path / "m.safetensors")["backbones"]["input"]
    assert saved["input_size"] == [3, 48, 48]
    assert saved["num_classes"] == 7


def test_digits_are_all_there_split_by_class_and_true(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    assert write_digits(tmp_path / "digits") == (1438, 359)
    digits = datasets.load_digits()
    seen = {}
    for path in (tmp_path / "digits").rglob("*.png"):
        seen[int(path.stem)] = path
        assert digits.target[int(path.stem)] == int(path.parent.name)
    assert len(seen) == 1797
    for label in range(10):
        held_out = len(list((tmp_path / "digits" / "val" / str(label)).iterdir()))
        assert held_out == round(0.2 * (digits.target == label).sum())
    small = np.asarray(Image.open(seen[5]).resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(small.ravel(), digits.images[5].ravel())[0, 1] > 0.98
    before = {p.name for p in (tmp_path / "digits" / "val").rglob("*.png")}
    write_digits(tmp_path / "digits")
    assert {p.name for p in (tmp_path / "digits" / "val").rglob("*.png")} == before


def test_digits_replace_their_own_files_and_no_others(tmp_path):
    pytest.importorskip("sklearn")
    write_digits(tmp_path / "digits", limit=100)
    assert write_digits(tmp_path / "digits", limit=30) == (20, 10)
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 30
    (tmp_path / "digits" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match=r"mine\.txt"):
        write_digits(tmp_path / "digits")
    assert (tmp_path / "digits" / "mine.txt").read_text() == "precious"
    with pytest.raises(DataError, match="too few"):
        write_digits(tmp_path / "other", limit=20)


def test_digits_without_scikit_learn_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"\.\[quickstart\]"):
        write_digits(tmp_path / "digits")


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_learn_from_folders(fit, images, tmp_path, channels):
    lines = []
    report = fit(
        in_chans=channels, epochs=1, aa="rand-m9-mstd0.5", color_jitter=0.4, say=lines.append
    )
    assert report.epochs[0].val_top1 is not None
    assert any("left out for RGBA" in line for line in lines) == (channels == 4)
    config = resolve_model_data_config(report.model)
    assert config["input_size"][0] == len(config["mean"]) == channels


def test_other_numbers_of_channels_are_refused(fit):
    with pytest.raises(ConfigError, match="takes 5; pass it tensors"):
        fit(in_chans=5)


@pytest.mark.parametrize(
    "size", [{"img_size": (32, 48)}, {"img_size": None, "input_size": (3, 32, 48)}]
)
def test_oblong_images(fit, size):
    report = fit(**size, epochs=1)
    assert resolve_model_data_config(report.model)["input_size"] == (3, 32, 48)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"img_size": (32, 32, 3)}, "a side or height and width"),
        ({"img_size": 0}, "img_size must be at least 1"),
        ({"input_size": (3, 32, 32)}, "leave these out"),
        ({"img_size": None, "input_size": (32, 32)}, "channels, height, width"),
    ],
)
def test_sizes_that_are_none(fit, size, words):
    with pytest.raises(ConfigError, match=words):
        fit(**size)
