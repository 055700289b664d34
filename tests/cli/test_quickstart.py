"""The main job in processes of its own: short here, whole under -m slow."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import backbones
from backbones import quickstart
from backbones.cli import main
from backbones.engines import OnnxRuntimeRunner

for package in quickstart.NEEDS:
    pytest.importorskip(package)

SHORT = ["--limit", "60", "--epochs", "1", "--size", "32", "--model", "convnext_atto"]


def backbones_process(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "backbones", *map(str, argv)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(backbones.__file__).parents[1],
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "out"
    done = backbones_process("quickstart", "--output", output, *SHORT, HF_HUB_OFFLINE="1")
    return done, output


def test_too_few_right_is_a_failure_and_yet_leaves_all_files(short):
    done, output = short
    assert done.returncode == 1, done.stderr
    assert "below the 98.5 % asked for" in done.stderr
    assert done.stderr.count("\n") == 1  # neither a bar nor a traceback where no terminal is
    assert "starting from scratch" in done.stdout
    assert {p.name for p in output.iterdir()} == {"digits", "training", *quickstart.RESULTS}
    assert len(list((output / "digits").rglob("*.png"))) == 60


def test_the_report_holds_what_the_files_show(short):
    _, output = short
    report = json.loads((output / "report.json").read_text())
    assert report["passed"] is False
    assert report["top1"] == report["onnx_top1"]
    assert report["agreement"]["top1_agreement"] == 1
    assert report["agreement"]["count"] == report["images"]["val"]
    wrong = len(report["mistakes"])
    assert report["top1"] == pytest.approx(100 * (1 - wrong / report["images"]["val"]))
    assert {name: set(v) for name, v in report["latency"].items()} == {
        name: {"median_ms", "p90_ms", "runs", "threads"}
        for name in ("pytorch", "reparameterized", "best")
    }
    assert all(Path(mistake["file"]).is_file() for mistake in report["mistakes"])


def test_the_checkpoint_and_the_onnx_file_are_the_same_model(short):
    _, output = short
    saved = backbones.weights.read_metadata(output / "model.safetensors")["backbones"]
    assert saved["classes"] == list("0123456789")
    assert saved["input"]["input_size"] == [3, 32, 32]
    model = backbones.create_model(saved["name"], checkpoint_path=output / "model.safetensors")
    runner = OnnxRuntimeRunner(output / "model.onnx")
    assert runner.metadata["classes"] == saved["classes"]
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(runner(images), model.eval()(images), rtol=1e-4, atol=1e-4)


def test_the_picture_shows_every_image_with_its_mistakes_marked(short):
    from PIL import Image

    _, output = short
    picture = Image.open(output / "predictions.png").convert("RGB")
    assert picture.width > 600
    colors = {color for _, color in picture.getcolors(1 << 24)}
    assert (220, 20, 60) in colors  # crimson: there are mistakes after one epoch


def test_predict_takes_the_checkpoint_as_it_is(short, capsys):
    _, output = short
    report = json.loads((output / "report.json").read_text())
    mistake = report["mistakes"][0]
    argv = ["predict", str(output / "model.safetensors"), mistake["file"]]
    assert main([*argv, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["predictions"][0]["class"] == mistake["predicted"]


class Hub(BaseHTTPRequestHandler):
    """A Hub with one file for every repository."""

    content = b""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"file"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """A Hub on this machine that serves a convnext_atto; yields its address and the weights."""
    torch.manual_seed(5)
    weights = backbones.create_model("convnext_atto").state_dict()
    save_file(weights, tmp_path / "served.safetensors")
    Hub.content = (tmp_path / "served.safetensors").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", weights
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_training_starts_from_weights_of_a_hub_that_answers(hub, tmp_path):
    address, weights = hub
    argv = ["quickstart", "--output", tmp_path / "out", *SHORT, "--lr", "1e-9", "--min-top1", "0"]
    done = backbones_process(
        *argv, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub")
    )
    assert done.returncode == 0, done.stderr
    if backbones.model_info("convnext_atto").weights[0].sha256 is not None:
        assert "starting from scratch" in done.stdout  # the file served is not the recorded one
        assert "sha256" in done.stdout or "bytes" in done.stdout
        return
    assert "starting from pretrained weights, convnext_atto.d2_in1k" in done.stdout
    # At this learning rate they are still what the Hub served.
    trained = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(trained["stem.0.weight"], weights["stem.0.weight"])


@pytest.mark.slow
def test_the_whole_main_job_reaches_its_bar(tmp_path):
    done = backbones_process("quickstart", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passed"]
    assert report["top1"] >= 98.5
    assert report["images"] == {"train": 1438, "val": 359}
