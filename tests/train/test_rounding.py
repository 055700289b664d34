"""Quantization-aware training: what rounds, what is trained, and what a run leaves."""

import pytest
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import history

import backbones
from backbones import train
from backbones.engines import export
from backbones.errors import ConfigError, UnsupportedError
from backbones.train.setup.rounding import rounding_twin, weights_of_twin
from backbones.weights import read_metadata

pytest.importorskip("nncf")
BRANCHES = {"depths": [1, 1, 1, 1], "dims": [16, 16, 24, 32]}
SMALL = {"model": "inception_next_atto", "model_kwargs": BRANCHES}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A checkpoint of a model with norms and branches to merge."""
    options = {"recipe": "none", "pretrained": False, "img_size": 32, "crop_pct": 1.0}
    options |= {"batch_size": 16, "channels_last": False, "lr": 6e-3, "hflip": 0.0}
    output = tmp_path_factory.mktemp("trained")
    report = train.run(
        **SMALL, **options, data_dir=str(images), epochs=4, scale=(0.9, 1.0), output=str(output)
    )
    return report.folder / "model_best.safetensors"


@pytest.fixture
def fit_rounded(fit, trained):
    more = {"qat": True, "initial_checkpoint": str(trained), "lr": 1e-4, "pretrained": None}
    return lambda **options: fit(**{**SMALL, **more, **options})


class Chain(nn.Module):
    """Layers one after another."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def read_by_first_linear(model, images):
    """Return the operand that reaches PyTorch's function, past all hooks."""
    read = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                read.append(args[0] if "addmm" not in str(function) else args[1])
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(images)
    return read[0]


def test_layers_read_256_values_and_all_else_is_exact():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    model = Chain(layer, nn.Softmax(-1), nn.GELU())
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, -2.0, 3.0, 0.5])))  # whole steps
    images = torch.linspace(-1, 1, 1024).view(-1, 4)
    twin = rounding_twin(model, [images])
    taken = read_by_first_linear(twin, images)
    assert 200 < len(taken.unique()) <= 256
    assert 0 < (taken - images).abs().max() <= 1.01 / 255
    torch.testing.assert_close(twin(images), model(taken))


def test_gradients_pass_the_rounding_and_its_ranges_stay():
    torch.manual_seed(0)
    model = Chain(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    images = torch.randn(16, 3, 8, 8)
    twin = rounding_twin(model, [images])
    assert {name for name, value in twin.named_parameters() if value.requires_grad} == {
        name for name, _ in model.named_parameters()
    }
    assert weights_of_twin(twin).keys() == model.state_dict().keys()
    for one in (model, twin):
        one(images).square().sum().backward()
    for name, value in model.named_parameters():
        assert (
            torch.nn.functional.cosine_similarity(
                value.grad.flatten(), twin.get_parameter(name).grad.flatten(), dim=0
            )
            > 0.99
        )


def test_a_run_leaves_a_re_parameterized_checkpoint_for_int8_files(fit_rounded, images, tmp_path):
    report = fit_rounded()
    assert report.model.deployed and not report.model.training
    assert not [name for name in report.model.state_dict() if "nncf" in name]
    path = report.folder / "model_best.safetensors"
    saved = read_metadata(path)["backbones"]
    assert saved["provenance"]["qat"] is True
    assert saved["provenance"]["started_from"] == "model_best.safetensors"
    model = backbones.load_model(path)
    for name, value in report.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    file = export(
        model, tmp_path / "m.onnx", precision="int8", calibration=images / "train", agreement=0
    )
    assert file.path.is_file()


def test_what_is_validated_rounds(fit_rounded, trained, images):
    """The loss of the first weights is not quite that of the checkpoint without rounding."""
    rounded = fit_rounded(epochs=1, lr=1e-12, warmup_lr=1e-12, min_lr=0.0).epochs[0].val_loss
    model = backbones.load_model(trained)
    found = train.validate(model, images, resolve_model_data_config(model), split="val")
    exact = found.evaluation.loss
    assert rounded != pytest.approx(exact, rel=1e-5)
    assert rounded == pytest.approx(exact, rel=0.1)


def test_a_resumed_run_goes_on_as_if_nothing_had_been(fit_rounded, tmp_path):
    whole = fit_rounded(model_ema=True, model_ema_decay=0.7)

    def press_ctrl_c(update):
        if update.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_rounded(model_ema=True, model_ema_decay=0.7, experiment="broken", progress=press_ctrl_c)
    report = train.run(resume=tmp_path / "output" / "broken" / "last.pth.tar")
    assert history(report.folder) == history(whole.folder)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, report.model.state_dict()[name])


def test_the_classifier_alone_can_be_trained(fit_rounded, trained):
    """The backbone computes what it did; its channels are scaled."""
    before = backbones.reparameterize(backbones.load_model(trained).eval())
    after = fit_rounded(freeze_backbone=True, epochs=1).model
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            after.forward_features(images), before.forward_features(images), rtol=1e-5, atol=1e-5
        )
        assert (after(images) - before(images)).abs().max() > 1e-4


@pytest.mark.parametrize(
    "option", [{"torchcompile": "eager"}, {"grad_checkpointing": True}], ids=lambda o: next(iter(o))
)
def test_what_goes_around_the_rounding_is_refused(fit_rounded, option):
    with pytest.raises(ConfigError, match=f"qat and {next(iter(option))} exclude each other"):
        fit_rounded(**option)


def test_it_goes_on_from_trained_weights(fit):
    with pytest.raises(ConfigError, match="goes on from trained weights .--initial-checkpoint"):
        fit(qat=True)


def test_a_model_of_timm_without_a_deploy_form_is_refused(fit, tmp_path):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("resnet10t", num_classes=4)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    more = {"model": "resnet10t", "model_kwargs": {}, "pretrained": None}
    with pytest.raises(UnsupportedError, match="ResNet is a model of timm"):
        fit(qat=True, initial_checkpoint=str(tmp_path / "m.safetensors"), **more)
