"""Where a run begins, and that it says whose weights it began with."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from patterns import SMALL
from train_runs import weights_of

import backbones
from backbones import train
from backbones.cli import main
from backbones.errors import CheckpointError, WeightsUnavailableError
from backbones.train import initial_weights
from backbones.weights import read_metadata, save_checkpoint

STILL = {"lr": 1e-30, "epochs": 1, "weight_decay": 0.0}


class AnyStatus(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_hub_that_is_silent_or_absent_does_not_respond(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), AnyStatus) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert initial_weights.hub_responds(5)  # any status will do
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert not initial_weights.hub_responds(0.5)
    assert not initial_weights.hub_responds(5)  # closed by now


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of weights that serves instead of the Hub."""
    entry = backbones.manifest.load_manifest().find("inception_next_atto", None)
    folder = tmp_path / "mirror" / entry.repo
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    model = backbones.create_model("inception_next_atto")
    save_checkpoint(model, folder / entry.file)
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path / "mirror"))
    return weights_of(model), entry


def test_released_weights_are_taken_where_they_can_be_had(fit, mirror):
    released, entry = mirror
    lines = []
    report = fit(
        model="inception_next_atto", model_kwargs={}, pretrained=None, **STILL, say=lines.append
    )
    assert f"starting from pretrained weights, {entry.name}" in lines
    ours = weights_of(report.model)
    assert torch.allclose(ours["stem.0.weight"], released["stem.0.weight"])
    assert ours["head.fc2.weight"].shape[0] == 4
    saved = read_metadata(report.folder / "model_best.safetensors")["backbones"]
    assert saved["license"] == entry.license
    assert saved["provenance"]["started_from"] == entry.name
    # ... and a resumed run still knows it.
    again = train.run(resume=report.folder / "last.pth.tar", epochs=2)
    saved = read_metadata(again.folder / "model_best.safetensors")["backbones"]
    assert saved["license"] == entry.license
    assert again.initial_weights.source == entry.name


def test_without_them_a_run_starts_from_scratch_and_says_why(fit):
    lines = []
    report = fit(model_kwargs={**SMALL}, pretrained=None, epochs=1, say=lines.append)
    assert any(line.startswith("starting from scratch: ") for line in lines)
    saved = read_metadata(report.folder / "model_best.safetensors")["backbones"]
    assert saved["license"] is None
    assert report.initial_weights.from_scratch
    with pytest.raises(WeightsUnavailableError):
        fit(model_kwargs={}, pretrained=True)


def test_from_scratch_a_recipe_may_differ(options, fit, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "lr: 0.001\nwarmup_epochs: 0\ndrop_path: 0.3\nfrom_scratch: {lr: 0.004, drop_path: 0.1}\n"
    )

    drop_paths = []

    def highest(**more):
        rates = []
        without = {key: value for key, value in options.items() if key != "lr"}
        without |= {"recipe": str(recipe), "epochs": 1, **more}
        report = train.run(**without, progress=lambda update: rates.append(update.lr))
        drop_paths.append(report.model.config["arguments"]["drop_path_rate"])
        return max(rates)

    first = fit(epochs=1).folder / "model_best.safetensors"
    assert highest(pretrained_path=str(first), sched="constant") == 0.001
    assert highest(sched="constant") == 0.004
    assert highest(sched="constant", lr=0.002) == 0.002  # what is said counts most
    assert drop_paths == [0.3, 0.1, 0.1]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_to_start_from(fit, tmp_path, suffix):
    first = fit(epochs=1)
    file = first.folder / "model_best.safetensors"
    if suffix == "pth":
        file = tmp_path / "weights.pth"
        torch.save({"state_dict": first.model.state_dict()}, file)
    known = weights_of(first.model)
    whole = weights_of(fit(initial_checkpoint=str(file), **STILL).model)
    assert all(torch.allclose(whole[key], known[key], atol=1e-5) for key in known)
    body = weights_of(fit(pretrained_path=str(file), **STILL).model)
    assert torch.allclose(body["stem.0.weight"], known["stem.0.weight"], atol=1e-5)
    assert not torch.allclose(body["head.fc.weight"], known["head.fc.weight"], atol=1e-3)


@pytest.mark.parametrize(("name", "kwargs"), [("test_resnet", {}), ("convnext_atto", SMALL)])
def test_a_checkpoint_of_other_classes_to_start_from(fit, tmp_path, name, kwargs):
    """Models of timm as well; asked for whole, it points to the option that takes the rest."""
    known = backbones.create_model(name, num_classes=7, **kwargs).state_dict()
    torch.save({"model_state_dict": known}, tmp_path / "m.pth")
    start = {"model": name, "model_kwargs": kwargs, "head_init_scale": None, **STILL}
    body = weights_of(fit(pretrained_path=str(tmp_path / "m.pth"), **start).model)
    first = next(iter(known))
    assert torch.allclose(body[first], known[first], atol=1e-5)
    with pytest.raises(CheckpointError, match=r"7 classes, the data has 4; --pretrained-path"):
        fit(initial_checkpoint=str(tmp_path / "m.pth"), **start)


@pytest.mark.parametrize("name", ["lsnet_t_distill", "uniformer_small_tl", "glnet_4g_tklb"])
def test_every_classifier_is_scaled(name):
    """A head of two classifiers begins as quiet in both."""
    config = train.TrainConfig(model=name, pretrained=False, head_init_scale=0.0)
    model, _ = initial_weights.create_initial_model(config, 4)
    layers = model.get_classifier()
    assert len(layers) == 2
    for layer in layers:
        assert not any(value.any() for value in layer.parameters())


def test_a_model_of_ones_own_is_rebuilt_without_its_yaml(fit, tmp_path, images, capsys):
    """What `train` prints at its end, "try it", needs the checkpoint alone."""
    yaml = tmp_path / "c#" / "mine.yaml"
    yaml.parent.mkdir()
    yaml.write_text(
        "family: convnext\nvariants:\n  tiny:\n    like: convnext_atto\n"
        "    depths: [1, 1, 1, 1]\n    dims: [8, 8, 16, 16]\n"
    )
    report = fit(model=str(yaml), model_kwargs={}, epochs=1)
    yaml.unlink()
    best = report.folder / "model_best.safetensors"
    loaded = backbones.load_model(best)
    assert (loaded.config["name"], loaded.num_classes) == ("tiny", 4)
    image = next(images.rglob("*.png"))
    capsys.readouterr()
    assert main(["predict", str(best), str(image)]) == 0
    assert any(name in capsys.readouterr().out for name in report.classes)
    assert main(["validate", str(best), str(images)]) == 0
    assert main(["export", str(best), str(tmp_path / "m.onnx")]) == 0
