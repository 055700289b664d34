"""The page that classifies in a browser: what it holds, and that a browser computes the same."""

import functools
import html
import http.server
import json
import queue
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small

from backbones.cli import main
from backbones.engines import OnnxRuntimeRunner, WebConfig, compare, export
from backbones.engines.web import PACKAGE, RUNTIME
from backbones.errors import ConfigError, MissingDependencyError, UnsupportedError
from backbones.weights import save_checkpoint

pytest.importorskip("onnxruntime")
CLASSES = ["one", "</script><b>two", "@model@"]
SIZE = (3, 64, 64)


@pytest.fixture
def runtime(tmp_path):
    """A folder with files of the runtime's names."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in RUNTIME:
        (folder / name).write_text(name)
    return folder


def test_the_page_holds_all_it_needs(runtime, tmp_path):
    model = small()
    config = WebConfig(runtime)
    report = export(model, tmp_path / "page", format=config, input_size=SIZE, classes=CLASSES)
    names = {path.name for path in report.path.iterdir()}
    assert names == {"index.html", "model.onnx", *RUNTIME}
    assert report.bytes == sum(path.stat().st_size for path in report.path.iterdir())
    assert report.checks and all(c.agreement.relative_error < 1e-4 for c in report.checks)
    page = (report.path / "index.html").read_text(encoding="utf-8")
    facts = re.search(r'id="facts">(.*?)</script>', page)[1]
    assert json.loads(facts) == {"classes": CLASSES, "channels": 3}
    assert page.count("</script>") == 2
    assert not re.search(r"@\w+@", page.replace("@model@", "", 1))
    assert not re.search(r"https?://", page)  # nothing from elsewhere
    photo = torch.randint(0, 256, (1, 90, 120, 3), dtype=torch.uint8)
    assert OnnxRuntimeRunner(report.path / "model.onnx")(photo).shape == (1, 3)


def test_a_page_is_replaced_as_a_whole(runtime, tmp_path):
    path = tmp_path / "page"
    for channels in (1, 4):
        model = small(in_chans=channels)
        export(model, path, format=WebConfig(runtime), input_size=(channels, 64, 64))
        assert f'"channels": {channels}' in (path / "index.html").read_text(encoding="utf-8")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    (runtime / "ort.wasm.min.mjs").unlink()
    with pytest.raises(ConfigError, match=r"lacks ort\.wasm\.min\.mjs; .* onnxruntime-web@"):
        export(small(), path, format=WebConfig(runtime), input_size=SIZE)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of several sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        picture(height=5 + i).save(folder / f"{i}.png")
    return folder


def picture(height=9):
    generator = np.random.default_rng(height)
    pixels = generator.integers(0, 256, (height, 14, 3), np.uint8).repeat(11, 0).repeat(13, 1)
    return Image.fromarray(pixels)


def test_an_int8_page_is_smaller_and_agrees(runtime, photos, tmp_path):
    saved = str(save_checkpoint(small(num_classes=500), tmp_path / "m.safetensors"))
    words = ["--format", "web", "--web-runtime", str(runtime), "--img-size", "64"]
    int8 = ["--precision", "int8", "--calibration", str(photos)]
    pages = tmp_path / "fp32", tmp_path / "int8"
    for page, more in zip(pages, ([], int8)):
        assert main(["export", saved, str(page), *words, *more]) == 0
    assert {p.name for p in pages[0].iterdir()} == {p.name for p in pages[1].iterdir()}
    exact, quantized = (OnnxRuntimeRunner(page / "model.onnx") for page in pages)
    assert quantized.raw and quantized.precision == "int8"
    assert quantized.path.stat().st_size < 0.75 * exact.path.stat().st_size
    x = torch.from_numpy(np.array(picture()))[None]
    assert 1e-4 < compare(exact(x), quantized(x)).relative_error < 0.1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"features": True}, "shows classes, not feature maps"),
        ({"precision": "bf16"}, "no precision 'bf16'; it has fp32, fp16, int8"),
    ],
)
def test_what_a_page_cannot_show(options, words, runtime, tmp_path):
    with pytest.raises(UnsupportedError, match=words):
        export(small(), tmp_path / "page", format=WebConfig(runtime), input_size=SIZE, **options)
    assert not (tmp_path / "page").exists()


def test_two_channels_are_no_photograph(runtime, tmp_path):
    model = small(in_chans=2)
    with pytest.raises(UnsupportedError, match="photographs have"):
        export(model, tmp_path / "page", format=WebConfig(runtime), input_size=(2, 64, 64))


def test_a_file_is_no_folder(runtime, tmp_path):
    (tmp_path / "page").write_text("mine")
    with pytest.raises(ConfigError, match="give a folder"):
        export(small(), tmp_path / "page", format=WebConfig(runtime), input_size=SIZE)
    assert (tmp_path / "page").read_text() == "mine"


def test_without_npm_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=f"fetch {PACKAGE}; .*--web-runtime FOLDER"):
        export(small(), tmp_path / "page", format="web", input_size=SIZE)
    assert not (tmp_path / "page").exists()


def test_npm_that_fails_is_told(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(MissingDependencyError, match=r"cannot fetch .* \(no such package\)"):
        export(small(), tmp_path / "page", format="web", input_size=SIZE)


def test_the_command(runtime, tmp_path, capsys):
    saved = str(save_checkpoint(small(), tmp_path / "m.safetensors", classes=CLASSES))
    page = str(tmp_path / "page")
    words = ["--format", "web", "--web-runtime", str(runtime), "--img-size", "64"]
    assert main(["export", saved, page, *words]) == 0
    assert "two" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert main(["export", saved, f"{page}.onnx", "--web-runtime", str(runtime)]) == 2
    assert "--web-runtime is for --format web" in capsys.readouterr().err


# Tells the test when the page is done: a browser's own ways to wait for that stop the clock.
TELL = """<script>
const line = document.querySelector("#status");
new MutationObserver(() => {
  if (/thread|cannot/.test(line.textContent))
    fetch("/done", { method: "POST", body: document.body.outerHTML });
}).observe(line, { childList: true });
</script></body>"""


class Served(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, which of them were asked for, and what the page became."""

    asked: list[str]
    done: queue.Queue[str]

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.done.put(body.decode())

    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, precision", [("photo.png", "fp32"), ("wide.jpg", "fp32"), ("photo.png", "int8")]
)
def test_a_browser_computes_the_same(name, precision, photos, tmp_path):
    """The real runtime, in a real browser, on a photograph of another size than the model's."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    options = {"input_size": SIZE, "classes": CLASSES, "precision": precision}
    options["calibration"] = photos if precision == "int8" else None
    try:
        report = export(small(), tmp_path / "page", format="web", **options)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    file = report.path / name
    picture().save(file)
    pixels = np.array(Image.open(file).convert("RGB"))
    logits = OnnxRuntimeRunner(report.path / "model.onnx")(torch.from_numpy(pixels)[None])
    expected = logits.softmax(-1)[0]
    Served.asked, Served.done = [], queue.Queue()
    index = report.path / "index.html"
    index.write_text(index.read_text(encoding="utf-8").replace("</body>", TELL), encoding="utf-8")
    handler = functools.partial(Served, directory=str(report.path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/index.html?image={name}"
        options = "--headless --no-sandbox --disable-gpu --remote-debugging-port=0".split()
        command = [browser, *options, f"--user-data-dir={tmp_path / 'b'}", address]
        shown = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            page = Served.done.get(timeout=240)
        finally:
            shown.kill()
            shown.wait()
            server.shutdown()
    found = re.findall(r'data-index="(\d)" data-probability="([\d.e-]+)">(.*?)<meter', page)
    assert len(found) == 3, page[-1500:]
    for index, probability, label in found:
        tolerance = 1e-4 if name.endswith("png") else 0.02  # JPEG decoders differ by gray levels
        assert abs(float(probability) - float(expected[int(index)])) < tolerance
        assert html.unescape(label) == CLASSES[int(index)]
    files = {path.split("?")[0].strip("/") for path in Served.asked} - {"favicon.ico"}
    assert files == {"index.html", "model.onnx", name, *RUNTIME}
