"""Operands and options in any order, as they reach a command, and MODEL in all its forms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import backbones
from backbones.cli import main
from backbones.cli.parsing import Parser, positive
from backbones.weights import read_metadata

ROOT = Path(__file__).parents[2]
MINE = (
    "family: convnext\nvariants:\n  mine: {like: convnext_atto, depths: [1, 1, 1, 1],"
    " dims: [8, 16, 24, 32]}\n"
)


@pytest.fixture
def parser():
    parser = Parser(exit_on_error=False)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("more", nargs="*")
    parser.add_argument("--size", type=positive, nargs="+")
    parser.add_argument("--free", nargs="*", accepts={"batch", "height"}.__contains__)
    parser.add_argument("--backend", nargs="?", const="one", accepts=lambda word: word == "two")
    parser.add_argument("--shape", type=int, nargs=3)
    parser.add_argument("-b", "--batch", type=int)
    parser.add_argument("--quick", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("m --size 64 o.onnx", {"size": [64]}),
        ("--size 64 32 m o.onnx", {"size": [64, 32]}),
        ("m --free batch height o.onnx", {"free": ["batch", "height"]}),
        ("m --free o.onnx", {"free": []}),
        ("m --quick o.onnx", {"quick": True}),
        ("m --backend o.onnx", {"backend": "one"}),
        ("m --backend two o.onnx", {"backend": "two"}),
        ("m --shape 3 32 64 o.onnx", {"shape": [3, 32, 64]}),
        ("--batch=4 m -b5 o.onnx", {"batch": 5}),
        ("m --bat 4 o.onnx", {"batch": 4}),
        ("m --batch -1 o.onnx", {"batch": -1}),
        ("m o.onnx x --quick y", {"more": ["x", "y"]}),
        ("--quick m -- o.onnx --x -y", {"more": ["--x", "-y"]}),
    ],
)
def test_options_take_their_values_and_leave_the_operands(parser, line, expected):
    args = vars(parser.parse_args(line.split()))
    assert (args["model"], args["out"]) == ("m", "o.onnx")
    assert {key: args[key] for key in expected} == expected


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an image, a variant, and a checkpoint of ten classes without metadata."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "mine.yaml").write_text(MINE)
    torch.manual_seed(0)
    model = backbones.create_model(str(folder / "mine.yaml"), num_classes=10)
    torch.nn.init.normal_(model.get_classifier().weight)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "m.pth"
    )
    Image.effect_noise((80, 60), 90).convert("RGB").save(folder / "a.png")
    return folder


def run(capsys, *argv):
    """Run a command that must succeed and return what it printed."""
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    """Run a command that must fail on its input, and return the message."""
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def test_sizes_and_dimensions_stand_before_the_file(files, tmp_path, capsys):
    model = ["export", files / "m.pth", "--name", files / "mine.yaml"]
    target = tmp_path / "m.pt2"
    assert "input 3x64x64" in run(capsys, *model, "--img-size", "64", target)
    assert "input 3x32x64" in run(capsys, *model, "--input-size", "3", "32", "64", target)
    free = ["--img-size", "64", "--dynamic", "batch", "height", "width"]
    free = run(capsys, *model, *free, target)
    assert "3x96x128" in free  # the file was compared at a second size
    message = refused(capsys, *model, target, "--dynamic", "depth")
    assert "no dynamic dimension 'depth'" in message
    message = refused(capsys, *model, target, "--img-size", "64", "--input-size", "3", "64", "64")
    assert "give one of them" in message
    message = refused(capsys, *model, target, "--input-size", "1", "64", "64")
    assert "takes images of 3 channels, not of 1" in message


def test_a_checkpoint_of_another_trainer_in_every_command(files, tmp_path, capsys):
    image, named = files / "a.png", ["--name", files / "mine.yaml"]
    predict = ["predict", files / "m.pth", image, *named]
    (row,) = json.loads(run(capsys, *predict, "--num-classes", "10", "--top-k", "20", "--json"))
    assert {guess["class"] for guess in row["predictions"]} == {f"class {i}" for i in range(10)}
    message = refused(capsys, *predict, "--num-classes", "7")
    assert "--num-classes 7" in message
    assert "10 classes" in message
    assert "classes          10" in run(capsys, "info", files / "m.pth", *named)
    argv = ["bench", files / "m.pth", *named, "--engines", "published", "--seconds", "0.2"]
    argv += ["--input-size", "3", "32", "64", "--threads", "1", "--json"]
    (report,) = json.loads(run(capsys, *argv, "--num-classes", "10"))
    assert report["input_size"] == [3, 32, 64]
    assert "10 classes" in refused(capsys, *argv, "--num-classes", "7")


@pytest.mark.parametrize(
    "text", ["\ufeff" + "\r\n".join(f"kind {i}" for i in range(10)) + "\r\n\r\n", None]
)
def test_names_of_classes(files, tmp_path, capsys, text):
    names = tmp_path / "names.txt"
    text = "\n".join(f"kind {i}" for i in range(10)) if text is None else text
    names.write_bytes(text.encode())
    options = ["--name", files / "mine.yaml", "--class-names", names]
    argv = ["predict", files / "m.pth", *options, files / "a.png", "--top-k", "10"]
    shown = run(capsys, *argv)
    assert all(f"  kind {i}\n" in shown for i in range(10))
    target = tmp_path / "deploy.safetensors"
    run(capsys, "reparam", files / "m.pth", *options, target, "--img-size", "32", "48")
    saved = read_metadata(target)["backbones"]
    assert saved["classes"] == [f"kind {i}" for i in range(10)]
    assert saved["input"]["input_size"] == [3, 32, 48]
    names.write_bytes(text.rstrip().rpartition("\n")[0].encode())
    message = refused(capsys, *argv)
    assert "9 classes" in message
    assert "has 10" in message
    names.write_text("a\n\nb\n")
    assert "names.txt, line 2" in refused(capsys, *argv)
    names.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(capsys, *argv)
    assert "No such file" in refused(capsys, *argv, "--class-names", tmp_path / "none.txt")
    assert "directory" in refused(capsys, *argv, "--class-names", tmp_path)


def test_the_size_asked_for_reaches_the_model(files, capsys):
    argv = ["predict", files / "m.pth", files / "a.png", "--name", files / "mine.yaml", "--json"]
    small = run(capsys, *argv, "--img-size", "32", "64")
    assert small == run(capsys, *argv, "--input-size", "3", "32", "64")
    assert small != run(capsys, *argv)
    message = refused(capsys, *argv, "--input-size", "4", "32", "64")
    assert "takes images of 3 channels, not of 4" in message
    assert "one or two numbers" in refused(capsys, *argv, "--img-size", "1", "2", "3")


def test_what_is_no_checkpoint_is_named(files, tmp_path, capsys):
    assert "no such file" in refused(capsys, "info", tmp_path / "no.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder" in refused(capsys, "predict", tmp_path / "folder.pth", files / "a.png")
    message = refused(capsys, "predict", "convnext_atto", files / "a.png", "--name", "lsnet_t")
    assert "--name is for a checkpoint" in message
    message = refused(capsys, "export", files / "m.pth", tmp_path / "o.onnx", "--random")
    assert "--random is for a name" in message
    # Any suffix will do for a file that is there.
    unusual = tmp_path / "weights.dat"
    unusual.write_bytes((files / "m.pth").read_bytes())
    assert "classes          10" in run(capsys, "info", unusual, "--name", files / "mine.yaml")


def test_a_source_is_never_written_over(files, tmp_path, capsys):
    source = tmp_path / "m.pth"
    source.write_bytes((files / "m.pth").read_bytes())
    named = ["--name", files / "mine.yaml"]
    for command in (["export", "--format", "onnx"], ["reparam"], ["weights", "convert"]):
        message = refused(capsys, *command, source, source, *named)
        assert "would replace its own source" in message
    assert source.read_bytes() == (files / "m.pth").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "foo"], "'foo' cannot be used"),
        (["-j", "-1"], "at least 0"),
        (["--crop-pct", "nan"], "above 0 and at most 1"),
        (["--crop-pct", "-1"], "above 0 and at most 1"),
        (["--output", "{a.png}"], "is a file; name a folder"),
        (["--output", "{a.png}/new/folder"], "is a file; name a folder"),
    ],
)
def test_odd_values_are_wrong_usage(files, capsys, options, words):
    options = [word.replace("{a.png}", str(files / "a.png")) for word in options]
    with pytest.raises(SystemExit) as end:
        main(["validate", "convnext_atto", str(files), *options])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_models_that_are_none(files, tmp_path, capsys):
    message = refused(capsys, "predict", tmp_path, files / "a.png")
    assert f"local-dir:{tmp_path}" in message
    assert "write hf-hub:owner/repo" in refused(capsys, "info", "hf-hub:a/b/c")
    argv = ["bench", files / "m.pth", "--name", files / "mine.yaml", "--engines", "published"]
    assert "finite" in refused(capsys, *argv, "--seconds", "inf")
    assert main(["predict", "resnet18", str(files / "a.png")]) == 1
    assert "resnet18: its weights cannot be had" in capsys.readouterr().err
    assert "parameters       11689512" in run(capsys, "info", "resnet18")


def test_timms_spelling_in_the_script(files):
    root = files / "images" / "val" / "x"
    root.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "0.png")
    argv = ["--model", files / "mine.yaml", "--checkpoint", files / "m.pth", "--num-classes", "7"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "validate.py", root.parents[1], *argv],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "m.pth has 10 classes" in done.stderr
