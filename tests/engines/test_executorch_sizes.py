"""ExecuTorch programs with free height and width: what they take, compute and refuse."""

import json

import pytest
import torch
from damping import damp
from randomized import randomize
from small_models import small
from tiers import shallow, smallest_of_each_family, smallest_size
from torch import nn

import backbones
from backbones.cli import main
from backbones.engines import ExecuTorchConfig, export, open_exported
from backbones.errors import ConfigError, ExportError, InputSizeError, UnsupportedError

pytest.importorskip("executorch")
FREE = ("batch", "height", "width")
SIZE = (3, 64, 64)
QUICK = {"convnext_atto"}


class Added(nn.Module):
    """A convolution, and an axis added to the mean of its channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.fc((x * x.mean(1).unsqueeze(1)).mean((2, 3)))


class OfOneSize(nn.Module):
    """A linear layer over the places of a map."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64 * 64, 5)

    def forward(self, x):
        return self.fc(x.mean(1).flatten(1))


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def error_of(model, runner, x):
    with torch.no_grad():
        expected = model(x)
    return float((runner(x) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in smallest_of_each_family()
    ],
)
def test_every_family_takes_all_sizes_or_says_why_not(name, tmp_path):
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=7, **shallow(name, blocks=1)).eval()
    path = tmp_path / "m.pte"
    if model.fixed_size_reason:
        with pytest.raises(UnsupportedError, match="cannot stay free.*one file a size"):
            export(model, path, input_size=SIZE, dynamic=FREE)
        assert not list(tmp_path.iterdir())
        return
    model, stride = damp(randomize(model), name), smallest_size(model)
    report = export(model, path, input_size=SIZE, dynamic=FREE)
    shapes = [check.shape for check in report.checks]
    assert shapes[2:] == [(1, 3, 2 * stride, 128), (1, 3, 128, 128)]
    assert all(check.agreement.relative_error < 1e-4 for check in report.checks)
    runner = open_exported(path)
    for batch, *size in ((1, 64, 96), (3, 128, 64), (8, 128, 128), (2, 96, 96), (1, 64, 64)):
        assert error_of(model, runner, images(batch, 3, *size)) < 1e-4, size


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """An axis is added to a map of which all sizes are free."""
    path = tmp_path_factory.mktemp("free") / "m.pte"
    return export(Added().eval(), path, input_size=SIZE, dynamic=FREE)


def test_all_sizes_between(free):
    assert free.dynamic == FREE
    assert "height may be any of the multiples of 32 from 64 to 128" in str(free)
    model, runner = Added().eval(), open_exported(free.path)
    for batch, *size in ((1, 64, 64), (3, 96, 128), (9, 128, 64), (8, 128, 128)):
        assert error_of(model, runner, images(batch, 3, *size)) < 1e-4


@pytest.mark.parametrize(
    "height, width, words",
    [
        (70, 64, r"for height the multiples of 32 from 64 to 128, got \(1, 3, 70, 64\); resize"),
        (64, 100, "for width the multiples of 32 from 64 to 128"),
        (160, 64, "for height"),
        (96, 32, "for width"),
    ],
)
def test_other_sizes_are_named(free, height, width, words):
    with pytest.raises(InputSizeError, match=words):
        open_exported(free.path)(images(1, 3, height, width))


def test_programs_find_the_sizes_in_the_file(free):
    facts = open_exported(free.path).metadata
    assert facts["free_sizes"]["width"] == {"least": 64, "most": 128, "step": 32}
    assert facts["shape"] == [8, 3, 128, 128]  # what memory is planned for


def test_one_side_and_a_bound(tmp_path):
    model = Added().eval()
    report = export(
        model,
        tmp_path / "m.pte",
        format=ExecuTorchConfig(max_size=200),
        input_size=(3, 96, 40),
        dynamic=("batch", "height"),
        batch_size=2,
    )
    assert [check.shape for check in report.checks] == [
        (2, 3, 96, 40),
        (2, 3, 64, 40),
        (2, 3, 192, 40),
    ]
    runner = open_exported(report.path)
    assert error_of(model, runner, images(2, 3, 160, 40)) < 1e-4
    for shape in ((2, 3, 96, 64), (2, 3, 224, 40), (1, 3, 96, 40)):
        with pytest.raises(InputSizeError):
            runner(images(*shape))


def test_int8_takes_all_sizes(tmp_path):
    model = Added().eval()
    report = export(
        model,
        tmp_path / "m.pte",
        input_size=SIZE,
        dynamic=FREE,
        precision="int8",
        calibration=images(32, *SIZE),
    )
    runner = open_exported(report.path)
    for size in ((64, 64), (64, 128), (128, 96), (128, 128)):
        assert error_of(model, runner, images(2, 3, *size)) < 0.1


@pytest.mark.parametrize(
    "size, options, words",
    [
        ((3, 48, 64), {"dynamic": FREE}, "a free height is one of the multiples of 32 from 64"),
        ((3, 64, 32), {"dynamic": FREE}, "a free width .* and input_size has 32"),
        ((3, 64, 64), {"dynamic": FREE, "bound": 64}, "max_size no smaller one and at least 96"),
        ((3, 64, 64), {"bound": 96}, "none is free; add them to dynamic, or leave max_size out"),
    ],
)
def test_impossible_sizes_leave_no_file(size, options, words, tmp_path):
    config = ExecuTorchConfig(max_size=options.pop("bound", None))
    with pytest.raises(ConfigError, match=words):
        export(Added(), tmp_path / "m.pte", format=config, input_size=size, **options)
    assert not list(tmp_path.iterdir())


def test_a_model_of_one_size_says_so(tmp_path):
    path = tmp_path / "m.pte"
    path.write_text("the file of before")
    with pytest.raises(ExportError, match="height and width cannot stay free: .*one file a size"):
        export(OfOneSize(), path, input_size=SIZE, dynamic=FREE)
    assert path.read_text() == "the file of before"
    assert [one.name for one in tmp_path.iterdir()] == ["m.pte"]


def test_photographs_keep_one_size(tmp_path):
    report = export(
        Added(), tmp_path / "m.pte", input_size=SIZE, dynamic=FREE, preprocess=True, verify=False
    )
    assert report.dynamic == ("batch",)
    assert open_exported(report.path).shape == (None, 64, 64, 3)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    saved = str(backbones.save_checkpoint(small(), tmp_path / "m.safetensors"))
    options = ["--img-size", "64", "--dynamic", *FREE, "--max-size", "96", "--json"]
    assert main(["export", saved, str(tmp_path / "m.pte"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checks"][-1]["shape"] == [1, 3, 96, 96]
    assert report["notes"]["delegated_share"] > 0.95  # norms and large kernels as well
    assert report["notes"]["free_sizes"]["width"] == "multiples of 32 from 64 to 96"
