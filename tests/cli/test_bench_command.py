"""``backbones bench``: real models in real processes, and bad usage."""

import json

import pytest
import torch

import backbones
from backbones.cli import main
from backbones.train import set_input

SHAPE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
QUICK = ["--img-size", "32", "--threads", "1", "--seconds", "0.2"]


def test_one_model_against_its_published_form(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)
    model = backbones.create_model("convnext_atto", num_classes=3, **SHAPE)
    set_input(model, 48)
    file = str(backbones.save_checkpoint(model, tmp_path / "m.safetensors"))
    output = tmp_path / "out"
    argv = ["bench", file, "--engines", "eager", "--threads", "1"]
    argv += ["--seconds", "0.2", "--batch-size", "2", "--output", str(output), "--json"]
    assert main(argv) == 0
    assert not (tmp_path / "torch").exists()  # engines' files are not kept
    captured = capsys.readouterr()
    (report,) = json.loads(captured.out)
    assert json.loads((output / "bench.json").read_text()) == [report]
    assert (report["model"], report["weights"]) == ("convnext_atto", file)
    assert report["input_size"] == [3, 48, 48]
    assert report["params"] == sum(p.numel() for p in model.parameters())
    assert [(r["engine"], r["form"]) for r in report["rows"]] == [
        ("eager", "published"),
        ("eager", "reparameterized"),
    ]
    for row in report["rows"]:
        assert row["reason"] is None
        assert 0 < row["median_ms"] <= row["p90_ms"]
        assert row["threads"] == 1
        assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])
        assert row["base_mib"] < row["peak_mib"]
        assert row["calls"] >= 24
    machine = report["machine"]
    assert machine["processor"]
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["rows"][0]["gmacs_per_second"] < machine["matmul_gmacs"]["fp32"]


def test_a_budget_and_a_picture(capsys, tmp_path):
    argv = ["bench", "--budget", "20s", "convnext_atto", "--engine", "published", *QUICK]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "| convnext_atto | d2_in1k | " in captured.out
    assert "within 20000 ms: convnext_atto, 75.672 % top-1" in captured.out
    assert "published for another size" in captured.out
    assert {path.name for path in tmp_path.iterdir()} == {"front.json", "front.csv", "front.png"}
    (row,) = json.loads((tmp_path / "front.json").read_text())["rows"]
    assert row["on_front"]
    assert row["input_size"] == [3, 32, 32]
    assert row["engine"] == "eager"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name a model"),
        (["lsnet_tt", "--engines", "published"], "did you mean 'lsnet_t'"),
        (["lsnet_t", "--engines", "openvno"], "did you mean 'openvino'"),
        (["lsnet_t", "--precisions", "fp23"], "did you mean 'fp32'"),
        (["lsnet_t", "--precisions", "int8"], "--calibration"),
        (["lsnet_t", "--engines", "published", "--seconds", "0"], "more than 0"),
        (["lsnet_t", "--img-size", "1", "2", "3"], "height and width"),
        (["lsnet_t", "--engine", "eager"], "--engines"),
        (["nothing.safetensors", "--engines", "published"], "no such file"),
        (["a.pth", "b.pth", "--name", "lsnet_t"], "one checkpoint"),
        (["--budget", "soon"], "write 10ms"),
        (["--front", "--engines", "eager"], "--engines does not go with --front"),
        (["--front", "--precisions", "fp32,bf16"], "one precision"),
        (["--front", "lsmet_*", "--engine", "published"], "no model matches"),
    ],
)
def test_bad_usage_is_named(capsys, argv, words):
    assert main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "example: backbones bench convnext_atto" in shown
    assert "backbones bench --budget 10ms" in shown
