"""Images a second: each engine in its best setting, and what is said of it."""

import json

import pytest
from torch import nn

import backbones
from backbones.bench import throughput
from backbones.cli import main
from backbones.engines import available_engines, throughput_engines
from backbones.errors import ConfigError

SHAPE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
SIZE = (3, 64, 64)


@pytest.fixture(scope="module")
def tiny():
    model = backbones.create_model("convnext_atto", num_classes=3, **SHAPE).eval()
    nn.init.normal_(model.get_classifier().weight)
    return model


@pytest.fixture(scope="module")
def report(tiny):
    return throughput(
        tiny,
        engines=["eager", "onnxruntime"],
        precisions=["fp32", "bf16"],
        threads=2,
        batch_size=8,  # of which streams alone are searched
        input_size=SIZE,
        seconds=0.2,
    )


def test_the_fastest_comes_first(report):
    measured = [row for row in report.rows if row.images_per_second is not None]
    assert {(row.engine, row.precision) for row in measured} >= {
        ("eager", "fp32"),
        ("onnxruntime", "fp32"),
    }
    assert report.best == measured[0] == report.rows[0]
    figures = [row.images_per_second for row in measured]
    assert figures == sorted(figures, reverse=True) and figures[-1] > 0
    for row in measured:
        assert row.setting.batch_size == 8 and row.setting.streams * row.setting.threads == 2
    assert report.input_size == SIZE


@pytest.mark.slow
def test_the_batch_size_is_chosen_where_none_is_given(tiny):
    one = {"engines": ["onnxruntime"], "precisions": ["fp32"], "threads": 1}
    row = throughput(tiny, **one, input_size=SIZE, seconds=0.2).best
    assert row.setting.batch_size >= 1 and row.setting.streams * row.setting.threads == 1
    assert row.images_per_second > 0


def test_what_an_engine_cannot_do_is_a_row_with_the_reason(report):
    (row,) = [row for row in report.rows if (row.engine, row.precision) == ("onnxruntime", "bf16")]
    assert row.images_per_second is None
    assert "no precision 'bf16'" in row.reason
    assert f"onnxruntime bf16 was not measured: {row.reason}" in str(report)
    assert "| onnxruntime fp32 |" in str(report)


def test_for_many_images_engines_of_phones_are_left_out():
    assert {*throughput_engines()} < {*available_engines()}
    assert not {"executorch", "litert", "ncnn", "compile"} & {*throughput_engines()}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"engines": ["onnx"]}, "no engine 'onnx'"),
        ({"precisions": ["int8"]}, "int8 needs images"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"engines": ["published"]}, "the published form has no setting; name engines"),
    ],
)
def test_wrong_options(tiny, options, words):
    with pytest.raises(ConfigError, match=words):
        throughput(tiny, **options)


def test_the_command(tmp_path, capsys, tiny):
    saved = str(backbones.save_checkpoint(tiny, tmp_path / "m.safetensors"))
    options = ["--throughput", "--engines", "eager", "--img-size", "64", "--seconds", "0.1"]
    assert main(["bench", saved, *options, "--threads", "1", "-b", "2", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    (row,) = facts["rows"]
    assert row["setting"]["batch_size"] == 2 and row["images_per_second"] > 0
    assert facts["weights"] == saved
    assert main(["bench", saved, "--throughput", "--budget", "10ms"]) == 2
    assert "--throughput does not go with --front and --budget" in capsys.readouterr().err
