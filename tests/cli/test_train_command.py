"""The command line of training: timm's names, files of options, and what counts more."""

import dataclasses
import shlex

import pytest
import yaml
from PIL import Image

from backbones.cli import main
from backbones.train import TrainConfig

# What timm's training script and this command share.
TIMMS = """
data-dir dataset train-split val-split dataset-download class-map input-key target-key model
pretrained pretrained-path initial-checkpoint resume num-classes img-size in-chans crop-pct mean
std interpolation batch-size validation-batch-size channels-last grad-accum-steps
grad-checkpointing model-kwargs head-init-scale torchcompile torchcompile-mode device amp
amp-dtype opt opt-eps opt-betas momentum weight-decay clip-grad clip-mode layer-decay
layer-decay-min-scale opt-kwargs sched sched-on-updates lr lr-base lr-base-size lr-base-scale
warmup-lr min-lr epochs decay-milestones decay-epochs warmup-epochs warmup-prefix cooldown-epochs
decay-rate no-aug train-crop-mode scale ratio hflip vflip color-jitter aa bce-loss reprob remode
recount mixup cutmix cutmix-minmax mixup-prob mixup-switch-prob mixup-mode mixup-off-epoch
smoothing train-interpolation drop drop-path sync-bn dist-bn model-ema model-ema-decay
model-ema-warmup seed checkpoint-hist workers pin-mem output experiment eval-metric kd-model-name
kd-distill-type distill-loss-weight task-loss-weight kd-temperature config
""".split()


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name, color in (("dark", 20), ("light", 230)):
            for i in range(count):
                path = tmp_path / "images" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (color + i,) * 3).save(path)
    return tmp_path / "images"


def test_options_bear_timms_names(capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    missing = [name for name in TIMMS if f"--{name}" not in shown]
    assert not missing
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "example: backbones train --data-dir flowers" in shown


def test_flags_count_more_than_a_file_and_a_file_more_than_the_recipe(folder, tmp_path, capsys):
    config = tmp_path / "options.yaml"
    config.write_text("epochs: 3\nbatch-size: 4\nsmoothing: 0.0\nmodel-ema: true\n")
    argv = ["train", str(folder), "--config", str(config), "--epochs", "1", "-b", "2"]
    argv += ["--model", "convnext_atto", "--model-kwargs", "depths=[1,1,1,1]", "dims=[8,16,24,32]"]
    argv += ["--no-pretrained", "--img-size", "32", "--opt-betas", "0.8", "0.9", "--torchcompile"]
    argv += ["eager", "--no-model-ema", "--output", str(tmp_path), "--experiment", "run"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert arguments["epochs"] == 1
    assert arguments["batch_size"] == 2
    assert arguments["smoothing"] == 0.0
    assert arguments["model_ema"] is False
    assert arguments["clip_grad"] == 5.0  # the recipe's
    assert arguments["layer_decay"] is None  # the recipe's, from scratch
    assert arguments["opt_betas"] == [0.8, 0.9]
    assert arguments["torchcompile"] == "eager"
    best = tmp_path / "run" / "model_best.safetensors"
    assert f"backbones predict {best} IMAGE" in out
    image = folder / "val" / "light" / "0.png"
    assert main(["predict", str(best), str(image)]) == 0
    assert "light" in capsys.readouterr().out


def test_a_model_of_the_users_own(folder, tmp_path, capsys):
    own = tmp_path / "mine.yaml"
    own.write_text(
        "family: convnext\nvariants:\n  small:\n    like: convnext_atto\n"
        "    depths: [1, 1, 1, 1]\n    dims: [8, 16, 24, 32]\n"
    )
    argv = ["train", str(folder), "--model", str(own), "--img-size", "32", "--epochs", "1"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    (run,) = (tmp_path / "out").iterdir()
    assert run.name.endswith("-mine-32")
    best = str(run / "model_best.safetensors")
    image = str(folder / "val" / "light" / "0.png")
    capsys.readouterr()
    assert main(["predict", best, image, "--name", str(own)]) == 0
    assert {"dark", "light"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("model", ["my models/mine.yaml", "test_byobnet"])
def test_the_command_to_try_it_works_as_printed(folder, tmp_path, capsys, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my models").mkdir()
    (tmp_path / "my models" / "mine.yaml").write_text(
        "family: convnext\nvariants:\n  small: {like: convnext_atto, depths: [1, 1, 1, 1],"
        " dims: [8, 16, 24, 32]}\n"
    )
    argv = ["train", str(folder), "--model", model, "--img-size", "32", "--epochs", "1"]
    argv += ["--no-pretrained", "--output", "runs of mine", "--experiment", "it's"]
    assert main(argv) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("try it: ")]
    program, *words = shlex.split(line.removeprefix("try it: "))
    assert program == "backbones"
    image = str(folder / "val" / "light" / "0.png")
    assert main([image if word == "IMAGE" else word for word in words]) == 0
    assert {"dark", "light"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--interpolation", "bicubc"], "did you mean 'bicubic'"),
        (["--train-interpolation", "none"], "no train_interpolation 'none'"),
        (["--aa", "nope"], "aa 'nope'"),
        (["--torchcompile", "inducter"], "did you mean 'inductor'"),
        (["--seed", "99999999999999999999"], "seed must be at most"),
        (["--opt-betas", "0.9"], "optimizer 'adamw'"),
        (["--weight-decay", "nan"], "weight_decay must be at least 0, got nan"),
    ],
)
def test_odd_options_are_named_before_training(folder, tmp_path, options, words, capsys):
    own = tmp_path / "mine.yaml"
    own.write_text(
        "family: convnext\nvariants:\n  mine: {like: convnext_atto, depths: [1, 1, 1, 1],"
        " dims: [8, 16, 24, 32]}\n"
    )
    argv = ["train", str(folder), "--model", str(own), "--img-size", "32", "--epochs", "1"]
    assert main([*argv, "--no-pretrained", "--output", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err


def test_arguments_without_a_value_are_wrong_usage(folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--model", "convnext_atto", str(folder), "--model-kwargs", "foo"])
    assert end.value.code == 2
    assert "write KEY=VALUE, got 'foo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], "model is missing"),
        (["train", "--model", "convnext_attto"], "convnext_atto"),
        (["train", "--model", "convnext_atto"], "data_dir is missing"),
        (["train", "nowhere", "--model", "convnext_atto"], "nowhere: no such folder"),
        (["train", "--config", "nothing.yaml"], "nothing.yaml: no such file"),
        (["train", "--resume", "nothing.pth.tar"], "nothing.pth.tar: no such file"),
    ],
)
def test_bad_input_is_named(argv, words, capsys):
    assert main(argv) in (1, 2)
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
