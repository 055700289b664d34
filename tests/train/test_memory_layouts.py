"""The memory layout of training: measured, said, kept, and the same on resuming."""

import time

import pytest
import torch
import yaml
from patterns import short_run
from torch import nn

from backbones import train
from backbones.cli import main
from backbones.train import TrainConfig
from backbones.train.distributed import ProcessGroup
from backbones.train.setup import with_memory_layout

ALONE = ProcessGroup(torch.device("cpu"))
SLEEP_S = 0.02


class SlowIn(nn.Module):
    """A model that takes longer in one memory layout, and has statistics and dropout."""

    pretrained_cfg = {"input_size": (3, 16, 16)}

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, x):
        if x.is_contiguous(memory_format=self.layout):
            time.sleep(SLEEP_S)
        return self.drop(self.norm(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize("slow", [torch.contiguous_format, torch.channels_last])
def test_the_faster_layout_is_taken_and_said(slow):
    lines = []
    config = with_memory_layout(TrainConfig(model="any"), ALONE, SlowIn(slow), lines.append)
    assert config.channels_last is (slow is torch.contiguous_format)
    name = "contiguous" if slow is torch.channels_last else "channels last"
    assert len(lines) == 1 and lines[0].startswith(f"memory layout: {name};")


def test_measuring_leaves_the_model_and_random_numbers_alone():
    model = SlowIn(torch.channels_last).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with_memory_layout(TrainConfig(model="any"), ALONE, model, lambda line: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(p.is_contiguous() for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("asked", [True, False])
def test_a_layout_that_is_asked_for_is_not_measured(asked):
    lines, config = [], TrainConfig(model="any", channels_last=asked)
    assert with_memory_layout(config, ALONE, SlowIn(torch.channels_last), lines.append) is config
    assert not lines


def test_a_compiler_chooses_by_itself():
    config = TrainConfig(model="any", torchcompile="eager")
    slow = SlowIn(torch.contiguous_format)
    assert with_memory_layout(config, ALONE, slow, print).channels_last is False


def test_a_run_keeps_what_it_chose(images, tmp_path):
    options = short_run(images, tmp_path) | {"channels_last": "auto", "epochs": 1}
    lines = []
    report = train.run(**options, say=lines.append)
    chosen = yaml.safe_load((report.folder / "args.yaml").read_text())["channels_last"]
    assert isinstance(chosen, bool)
    assert sum(line.startswith("memory layout") for line in lines) == 1
    train.run(resume=str(report.folder / "last.pth.tar"), epochs=2, say=lines.append)
    assert sum(line.startswith("memory layout") for line in lines) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "auto"),
        (["--channels-last", "auto"], "auto"),
        (["--channels-last"], True),
        (["--no-channels-last"], False),
    ],
)
def test_the_flag(images, monkeypatch, words, expected):
    seen = {}
    monkeypatch.setattr(train, "run", lambda **options: seen.update(options) or "report")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--model", "lsnet_t", *words, str(images)]) == 0
    assert seen.get("channels_last", "auto") == expected and seen["data_dir"] == str(images)


def test_no_layout_takes_no_value(images, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--model", "lsnet_t", "--no-channels-last", "auto"])
    assert "takes no value" in capsys.readouterr().err
