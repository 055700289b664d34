"""Heat maps, pages of thumbnails, and the linear probe."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
import timm
import torch
from collections_of_images import CLASSES, small_model, write_pictures
from PIL import Image
from randomized import randomize
from tiers import families_by_default
from timm.data import resolve_model_data_config

import backbones
from backbones.cli import main
from backbones.errors import ConfigError, UnsupportedError
from backbones.inference import Explainer, Sheet, open_source, predict
from backbones.train import probe


@pytest.mark.parametrize("name", families_by_default())
def test_every_family_can_be_explained(name):
    """The map is the feature map of the last stage, weighted by the gradients of the class."""
    model = randomize(backbones.create_model(name, num_classes=5)).eval()
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    maps = model.forward_features(x).detach().requires_grad_()
    logits = model.forward_head(maps)[0]
    speaking = []
    for logit in logits:
        (gradient,) = torch.autograd.grad(logit, maps, retain_graph=True)
        speaking.append((gradient.mean((2, 3), keepdim=True) * maps).sum(1)[0].detach())
    index = max(range(5), key=lambda i: float(speaking[i].max()))  # for some nothing may speak
    expected = speaking[index]
    row, column = np.unravel_index(int(expected.argmax()), expected.shape)
    for method in Explainer.METHODS:
        explainer = Explainer(model, resolve_model_data_config(model), method=method)
        (heat,) = explainer.heat_map(x, [index])
        assert heat.shape == (96, 96)
        assert 0 <= heat.min() < heat.max() <= 1
        if method == "gradcam":
            step = 96 // expected.shape[0]
            around = heat[max(0, (row - 1) * step) :, max(0, (column - 1) * step) :]
            assert around[: 3 * step, : 3 * step].max() == heat.max()


def test_heat_maps_of_a_folder(tmp_path):
    model = small_model()
    write_pictures(tmp_path / "photos", 4)
    source = open_source(tmp_path / "photos")
    explainer = Explainer(model, resolve_model_data_config(model))
    for item, row in zip(source, predict(source, model)):
        path = explainer.write(item, row, tmp_path / "maps")
        assert path == tmp_path / "maps" / item.relative
        assert Image.open(path).size == (32, 32)
    with pytest.raises(ConfigError, match="no class 'ants'; did you mean 'ant'"):
        Explainer(_named(model), resolve_model_data_config(model), target="ants")
    by_name = Explainer(_named(model), resolve_model_data_config(model), target="bee")
    assert by_name.target == 1
    with pytest.raises(ConfigError, match="index below 4"):
        Explainer(model, resolve_model_data_config(model), target=4)
    tokens = timm.create_model("vit_tiny_patch16_224", img_size=32)
    with pytest.raises(UnsupportedError, match="no feature map"):
        Explainer(tokens, resolve_model_data_config(tokens)).heat_map(
            torch.zeros(1, 3, 32, 32), [0]
        )


def _named(model):
    model.pretrained_cfg["label_names"] = CLASSES
    return model


def make_sheet(folder, classes=CLASSES):
    model = small_model()
    write_pictures(folder, 10)
    bad = folder / "ant" / "x<b>.png"
    bad.write_bytes(b"no image")
    source = open_source(folder)
    sheet = Sheet(source, classes)
    rows = list(predict(source, model, classes=CLASSES))
    for number, row in enumerate(rows):
        sheet.add(number, row)
    return sheet, rows


def test_a_sheet_shows_mistakes_first(tmp_path):
    sheet, rows = make_sheet(tmp_path / "photos")
    page = sheet.write(tmp_path / "sheet.html").read_text(encoding="utf-8")
    figures = re.findall(r'<figure class="(\w*)" data-n="(\d+)" data-p="([\d.e-]+)"', page)
    assert sorted(int(n) for _, n, _ in figures) == list(range(len(rows)))
    wrong = [
        n for n, row in enumerate(rows) if not row.error and row.predictions[0].name != row.folder
    ]
    assert 0 < len(wrong) < len(rows) - 1
    first = [(kind, float(p)) for kind, _, p in figures[: len(wrong)]]
    assert {kind for kind, _ in first} == {"wrong"}
    assert [p for _, p in first] == sorted((p for _, p in first), reverse=True)
    assert f"{len(rows)} images, {len(wrong)} mistakes, 1 unreadable" in page
    assert "x&lt;b&gt;.png" in page
    assert "x<b>.png" not in page
    assert page.count("data:image/jpeg;base64,") == len(rows) - 1
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing from elsewhere


def test_a_sheet_without_class_folders(tmp_path):
    sheet, _ = make_sheet(tmp_path / "photos", classes=["one", "two"])
    page = sheet.write(tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "mistakes" not in page.split("<script>")[0]
    numbers = [int(n) for n in re.findall(r'data-n="(\d+)"', page)]
    assert numbers == sorted(numbers)


@pytest.mark.slow
def test_a_sheet_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    sheet, rows = make_sheet(tmp_path / "photos")
    path = sheet.write(tmp_path / "sheet.html")
    script = path.read_text(encoding="utf-8").replace(
        "</script>", "order.value = 'unsure'; show(); document.title = 'sorted';</script>"
    )
    path.write_text(script, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>sorted</title>" in shown
    found = [float(p) for p in re.findall(r'data-p="([\d.e-]+)"', shown)]
    assert len(found) == len(rows)
    assert found == sorted(found)


def test_a_probe_tells_whether_features_fit(tmp_path):
    """Images of two colors are told apart, images of no difference are not."""
    model = small_model()
    generator = np.random.default_rng(0)
    for name, split, count in (
        ("a", "train", 12),
        ("b", "train", 12),
        ("a", "val", 6),
        ("b", "val", 6),
    ):
        folder = tmp_path / "easy" / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            noise = generator.integers(0, 100, (40, 40, 3)).astype(np.uint8)
            noise[..., 0 if name == "a" else 2] += 150
            Image.fromarray(noise).save(folder / f"{i}.png")
    found = probe(model, tmp_path / "easy")
    assert (found.train_images, found.images, found.classes) == (24, 12, 2)
    assert found.features == 32
    assert found.top1 == 100.0
    assert found.chance == 50.0


def test_the_probe_as_a_command(tmp_path, capsys):
    model = small_model()
    backbones.save_checkpoint(model, tmp_path / "m.safetensors", classes=CLASSES)
    write_pictures(tmp_path / "photos", 20)
    argv = ["validate", str(tmp_path / "m.safetensors"), str(tmp_path / "photos"), "--probe"]
    assert main(argv) == 0
    assert "linear probe" in capsys.readouterr().out
    assert main([*argv, "--output", str(tmp_path)]) == 2
    assert "leave out --output" in capsys.readouterr().err
