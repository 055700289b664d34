"""Images as they come: upright, deep, too large, with other channels."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_model_data_config

import backbones
from backbones.errors import ConfigError, DataError
from backbones.images import open_image

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def deep(path, values):
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_gray_of_up_to_16_bits_spans_black_to_white(tmp_path, suffix, bits):
    values = (RAMP * (2**bits - 1)).round().astype(np.uint16)
    shown = np.asarray(open_image(deep(tmp_path / f"a.{suffix}", values), "L"))
    assert np.abs(shown - RAMP * 255).max() <= 1


@pytest.mark.parametrize("most", [1.0, 255.0, 65535.0])
def test_floating_point_gray_spans_black_to_white(tmp_path, most):
    values = (RAMP * most).astype(np.float32)
    shown = np.asarray(open_image(deep(tmp_path / "a.tif", values)))
    assert shown.shape == (8, 8, 3)
    assert np.abs(shown[..., 0] - RAMP * 255).max() <= 1


@pytest.mark.parametrize("bits", [16, 24, 31])
def test_gray_of_32_bits_spans_black_to_white(tmp_path, bits):
    values = (RAMP * (2**bits - 1)).round().astype(np.int32)
    shown = np.asarray(open_image(deep(tmp_path / "a.tif", values), "L"))
    assert np.abs(shown - RAMP * (255 if bits < 31 else 127.5)).max() <= 1


@pytest.mark.parametrize(
    "values",
    [np.array([[-1024, 3000]], np.int32), np.array([[0.5, np.nan]], np.float32),
     np.array([[-1.0, 1.0]], np.float32), np.array([[0.0, 1e9]], np.float32)],
    ids=["negative", "nan", "negative float", "large"],
)  # fmt: skip
def test_values_without_black_and_white_are_refused(tmp_path, values):
    with pytest.raises(DataError, match=r"a\.tif: values from .* convert it"):
        open_image(deep(tmp_path / "a.tif", values))


def sixteen_bit_colors(path, values):
    """Write a PNG of 16 bits a color, which Pillow cannot."""
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_colors_of_16_bits(tmp_path):
    values = np.repeat(RAMP[..., None], 3, axis=2)
    full = sixteen_bit_colors(tmp_path / "a.png", (values * 65535).astype(np.uint16))
    assert np.abs(np.asarray(open_image(full)) - values * 255).max() <= 1
    twelve = sixteen_bit_colors(tmp_path / "b.png", (values * 4095).astype(np.uint16))
    with pytest.raises(DataError, match=r"b\.png: 16-bit colors that use 14 bits or fewer"):
        open_image(twelve)


def test_a_turned_deep_image_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = (np.linspace(0, 1, 8).reshape(2, 4) * 65535).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png", "L").size == (2, 4)


def test_too_large_is_not_damaged_and_can_be_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    Image.new("1", (1200, 1000)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: 2 megapixels.*BACKBONES_MAX_MEGAPIXELS=2"):
        open_image(tmp_path / "a.png")
    monkeypatch.setenv("BACKBONES_MAX_MEGAPIXELS", "2")
    assert open_image(tmp_path / "a.png").size == (1200, 1000)
    monkeypatch.setenv("BACKBONES_MAX_MEGAPIXELS", "0")
    assert open_image(tmp_path / "a.png").size == (1200, 1000)
    monkeypatch.setenv("BACKBONES_MAX_MEGAPIXELS", "many")
    with pytest.raises(ConfigError, match="'many'"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_input_of_a_model_has_a_mean_and_std_a_channel(name, channels):
    config = resolve_model_data_config(backbones.create_model(name, in_chans=channels))
    assert config["input_size"][0] == channels
    assert len(config["mean"]) == len(config["std"]) == channels


def photographs(root):
    rng = np.random.default_rng(0)
    for label in "ab":
        for i in range(4):
            path = root / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 40, 4), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize("channels", [1, 4])
def test_folders_calibrate_models_of_other_channels(tmp_path, channels):
    from backbones.engines.preparation import load_images

    photographs(tmp_path)
    model = backbones.create_model("convnext_atto", in_chans=channels)
    config = {**resolve_model_data_config(model), "input_size": (channels, 32, 32)}
    assert load_images(str(tmp_path), config).shape == (8, channels, 32, 32)
    assert torch.isfinite(model.eval()(load_images(str(tmp_path), config))).all()


def test_calibration_reads_as_the_rest_does(tmp_path):
    from backbones.engines.preparation import load_images

    config = {"input_size": (3, 16, 8), "crop_pct": 1.0, "interpolation": "nearest"}
    with pytest.raises(ConfigError, match="no images in it"):
        load_images(str(tmp_path), config)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.jpg", exif=exif)
    picture = Image.new("RGB", (8, 16))
    picture.paste((255, 255, 255), (0, 0, 8, 8))
    turned = picture.rotate(90, expand=True)
    turned.save(tmp_path / "a.png", exif=exif)
    upright = load_images(str(tmp_path), config)[1]
    assert upright[:, :8].mean() > upright[:, 8:].mean() + 1
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    (tmp_path / "worse.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"(?s)bad\.jpg: .*worse\.png: "):
        load_images(str(tmp_path), config)
    with pytest.raises(ConfigError, match="takes 5; pass it tensors"):
        load_images(str(tmp_path), {**config, "input_size": (5, 16, 8)})
