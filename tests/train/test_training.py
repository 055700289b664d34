"""Runs: what they learn, write and repeat, and that every option does what it says."""

import argparse
import csv
import json

import pytest
import torch
import yaml
from train_runs import history, losses_of, weights_of

import backbones
from backbones import train
from backbones.errors import CheckpointError
from backbones.train.checkpoints import read_training_checkpoint
from backbones.train.trainer import Trainer
from backbones.weights import read_metadata


def test_a_folder_in_a_usable_model_out(fit, images):
    lines, updates = [], []
    report = fit(epochs=8, say=lines.append, progress=updates.append)
    assert report.classes == ["east", "north", "south", "west"]
    assert report.epochs[-1].train_loss < 0.6 * report.epochs[0].train_loss
    assert report.epochs[report.best_epoch - 1].val_top1 == 100
    assert not report.model.training
    names = {path.name for path in report.folder.iterdir()}
    assert names >= {"args.yaml", "summary.csv", "last.pth.tar", "model_best.pth.tar"}
    assert names >= {"model_best.safetensors", "curves.png"}
    assert sum(name.startswith("checkpoint-") for name in names) == 3
    assert not [name for name in names if "tmp" in name]

    rows = list(csv.DictReader((report.folder / "summary.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(8))
    assert {"train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"} <= set(rows[0])
    arguments = yaml.safe_load((report.folder / "args.yaml").read_text())
    assert arguments["model"] == "convnext_atto"
    assert arguments["scale"] == [0.9, 1.0]

    assert [u.step for u in updates] == list(range(1, 25))
    assert updates[-1].steps == 24
    assert updates[-1].epoch == 8
    assert updates[-1].seconds_left == 0
    assert all(update.images_per_second > 0 for update in updates)
    rates = [update.lr for update in updates]
    assert rates[0] < max(rates) > rates[-1]  # warm-up, then cosine
    assert any("epoch 8/8" in line for line in lines)

    model = backbones.create_model(
        "convnext_atto", checkpoint_path=report.folder / "model_best.safetensors"
    )
    assert model.num_classes == 4
    assert weights_of(model).keys() == weights_of(report.model).keys()
    saved = read_metadata(report.folder / "model_best.safetensors")["backbones"]
    assert saved["classes"] == report.classes
    assert saved["license"] is None
    assert saved["provenance"]["trained_on"] == images.name
    assert saved["provenance"]["started_from"] is None
    assert saved["input"]["input_size"] == [3, 32, 32]


def test_a_seed_decides_a_run(fit):
    noisy = {"scale": (0.3, 1.0), "model_kwargs": {"depths": [1] * 4, "dims": [8, 16, 24, 32]}}
    first = losses_of(fit(seed=1, drop_path=0.5, **noisy))
    assert first == losses_of(fit(seed=1, drop_path=0.5, **noisy))
    assert first != losses_of(fit(seed=2, drop_path=0.5, **noisy))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(fit, tmp_path, workers):
    random = {
        "epochs": 4,
        "workers": workers,
        "drop_path": 0.3,
        "mixup": 0.4,
        "cutmix": 0.4,
        "aa": "rand-m5",
        "reprob": 0.2,
        "scale": (0.4, 1.0),
        "model_ema": True,
        "model_ema_decay": 0.7,
    }
    whole = fit(**random)

    def press_ctrl_c(update):
        if (update.epoch, update.step) == (3, 8):
            raise KeyboardInterrupt

    lines = []
    with pytest.raises(KeyboardInterrupt):
        fit(**random, experiment="broken", progress=press_ctrl_c, say=lines.append)
    last = tmp_path / "output" / "broken" / "last.pth.tar"
    assert f"--resume {last} goes on with epoch 3" in lines[-1]
    report = train.run(resume=last)
    assert report.folder == last.parent
    assert [epoch.epoch for epoch in report.epochs] == [3, 4]
    assert history(report.folder) == history(whole.folder)
    ours, theirs = (
        read_training_checkpoint(f / "last.pth.tar") for f in (last.parent, whole.folder)
    )
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(ours[key][name], value) for name, value in theirs[key].items())
    assert ours["saver"]["best_metric"] == theirs["saver"]["best_metric"]


def test_ctrl_c_in_the_first_epoch_can_be_resumed_too(fit, tmp_path):
    whole = fit()

    def press_ctrl_c(update):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(experiment="broken", progress=press_ctrl_c)
    report = train.run(resume=tmp_path / "output" / "broken" / "last.pth.tar")
    assert history(report.folder) == history(whole.folder)


def test_checkpoints_of_timms_script_go_on_too(fit, tmp_path):
    whole = fit()
    folder = fit(experiment="timms", epochs=1, lr=6e-3, warmup_epochs=0.5).folder
    content = read_training_checkpoint(folder / "last.pth.tar")
    args = vars(content["args"])
    for ours in ("classes", "start", "license", "recipe", "skip_bad", "val_fraction"):
        del args[ours]  # what timm's script does not know, and what ours does not
    content["args"] = argparse.Namespace(**{**args, "lr_base_scale": "", "naflex_loader": False})
    torch.save(content, folder / "last.pth.tar")
    report = train.run(resume=folder / "last.pth.tar", epochs=2)
    assert [epoch.epoch for epoch in report.epochs] == [2]
    assert report.epochs[0].train_loss < whole.epochs[0].train_loss


def test_a_new_run_never_writes_into_an_old_one(fit):
    first = fit(epochs=1)
    before = (first.folder / "summary.csv").read_bytes()
    second = fit(epochs=1)
    assert second.folder != first.folder
    assert (first.folder / "summary.csv").read_bytes() == before


def test_batches_added_up_are_one_large_batch(fit):
    plain = {"no_aug": True, "opt": "sgd", "lr": 0.05, "warmup_epochs": 0}
    whole = losses_of(fit(batch_size=16, **plain))
    parts = losses_of(fit(batch_size=4, grad_accum_steps=4, **plain))
    assert parts == pytest.approx(whole, abs=1e-5)
    assert losses_of(fit(batch_size=4, **plain)) != pytest.approx(whole, abs=1e-3)


def test_layer_decay_slows_the_early_layers(fit):
    step = {"epochs": 1, "batch_size": 48, "opt": "sgd", "no_aug": True, "warmup_epochs": 0}
    fresh = weights_of(fit(**step, lr=1e-30).model)

    def moved(layer_decay):
        trained = weights_of(fit(**step, layer_decay=layer_decay).model)
        return [
            float((trained[key] - fresh[key]).norm()) for key in ("stem.0.weight", "head.fc.weight")
        ]

    (stem, head), (slow_stem, same_head) = moved(None), moved(0.3)
    assert same_head == pytest.approx(head, rel=1e-3)
    assert slow_stem == pytest.approx(0.3**5 * stem, rel=1e-2)  # stem, four blocks, head


def test_a_frozen_backbone_trains_the_classifier_alone(fit):
    small = {"depths": [1] * 4, "dims": [8, 16, 24, 32]}  # with BatchNorm
    common = {"model": "inception_next_atto", "model_kwargs": small, "epochs": 1}
    first = fit(**common)
    start = str(first.folder / "model_best.safetensors")
    before = weights_of(first.model)
    after = weights_of(fit(**common, initial_checkpoint=start, freeze_backbone=True).model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {"head.fc2.weight", "head.fc2.bias"} == changed
    everything = weights_of(fit(**common, initial_checkpoint=start).model)
    moved = {key for key in before if not torch.equal(before[key], everything[key])}
    assert {"stem.0.weight", "stages.0.blocks.0.norm.running_mean"} <= moved


def test_the_average_of_the_weights_is_validated_and_kept(fit):
    report = fit(batch_size=48, model_ema=True, model_ema_decay=0.75)  # a step an epoch
    # timm's average begins as a copy of the weights after the first step.
    first = read_training_checkpoint(report.folder / "checkpoint-0.pth.tar")
    last = read_training_checkpoint(report.folder / "last.pth.tar")
    average = last["state_dict_ema"]
    for key, value in last["state_dict"].items():
        expected = 0.75 * first["state_dict"][key] + 0.25 * value
        assert torch.allclose(average[key], expected, atol=1e-6), key
    best = average if report.best_epoch == 2 else first["state_dict_ema"]
    best_weights = weights_of(report.model)
    assert all(torch.equal(best_weights[key], value) for key, value in best.items())
    assert not torch.equal(average["stem.0.weight"], last["state_dict"]["stem.0.weight"])


def test_an_average_of_hardly_anything_but_the_first_weights_is_told(fit):
    lines = []
    fit(model_ema=True, epochs=2, say=lines.append)  # of 6 updates
    assert "after all 6 updates, 100% of the average" in "\n".join(lines)
    assert "--model-ema-warmup" in "\n".join(lines)
    for more in ({"model_ema_warmup": True}, {"model_ema_decay": 0.2}, {"model_ema": False}):
        lines.clear()
        fit(**{"model_ema": True, "epochs": 1, **more}, say=lines.append)
        assert "model_ema:" not in "\n".join(lines)


def test_mixup_and_when_it_ends(fit):
    still = {
        "lr": 1e-30,
        "warmup_epochs": 0,
        "no_aug": True,
        "epochs": 3,
        "sched": "constant",
        "smoothing": 0.0,
    }
    plain = losses_of(fit(**still))
    assert plain[0] == pytest.approx(plain[2], abs=1e-6)
    mixed = losses_of(fit(**still, mixup=1.0, mixup_off_epoch=2))
    assert all(abs(a - b) > 1e-6 for a, b in zip(mixed[:2], plain[:2]))
    assert mixed[2] == pytest.approx(plain[2], abs=1e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"smoothing": 0.0},
        {"weight_decay": 3.0},
        {"clip_grad": 1e-3},
        {"bce_loss": True},
        {"cutmix": 1.0},
        {"opt": "lamb"},
        {"opt_betas": (0.5, 0.6)},
        {"drop": 0.5},
        {"drop_path": 0.5},
        {"aa": "rand-m9"},
        {"reprob": 0.9},
        {"vflip": 1.0},
        {"color_jitter": 0.0},
        {"head_init_scale": 5.0},
        {"sched": "poly"},
        {"warmup_epochs": 0},
        {"mean": (0.1, 0.2, 0.3)},
        {"scale": (0.2, 0.4)},
        {"opt_kwargs": {"eps": 0.1}},
        {"sched_on_updates": False},
    ],
    ids=lambda option: next(iter(option)),
)
def test_every_option_changes_the_run(fit, option, plain_losses):
    assert losses_of(fit(**option)) != plain_losses


@pytest.mark.parametrize("option", [{"grad_checkpointing": True}, {"channels_last": True}])
def test_options_that_change_only_how(fit, option, plain_losses):
    assert losses_of(fit(**option)) == pytest.approx(plain_losses, abs=1e-4)


def test_mixed_precision(fit):
    full, half = losses_of(fit(epochs=4)), losses_of(fit(epochs=4, amp=True))
    assert half != full
    assert half == pytest.approx(full, rel=0.1)


def test_compiled(fit, monkeypatch, plain_losses):
    compiled = losses_of(fit(torchcompile="eager"))
    assert compiled == pytest.approx(plain_losses, abs=1e-5)
    seen = []
    whole = Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda self, epoch: seen.append(self) or whole(self, epoch)
    )
    report = fit(torchcompile="eager", epochs=1)
    assert isinstance(seen[0].task.get_trainable_module(), torch._dynamo.OptimizedModule)
    assert not any(key.startswith("_orig_mod") for key in weights_of(report.model))


def test_the_learning_rate_grows_with_the_batch(fit):
    def highest(**more):
        rates = []
        fit(lr=None, lr_base=0.01, lr_base_size=64, **more, progress=lambda u: rates.append(u.lr))
        return max(rates)

    flat = {"sched": "constant", "warmup_epochs": 0}
    assert highest(**flat) == pytest.approx(0.01 / 2)  # batch 16, square root for adamw
    assert highest(**flat, lr_base_scale="linear") == pytest.approx(0.01 / 4)
    assert highest(**flat, grad_accum_steps=3) == pytest.approx(0.01 * (48 / 64) ** 0.5)
    assert highest(**flat, opt="sgd") == pytest.approx(0.01 / 4)


def test_the_best_epoch_is_kept(fit, monkeypatch):
    scores = iter([20.0, 70.0, 30.0])
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"loss": 1.0, "top1": next(scores), "top5": 100.0}
    )
    report = fit(epochs=3)
    assert report.best_epoch == 2
    best = read_training_checkpoint(report.folder / "checkpoint-1.pth.tar")["state_dict"]
    best_weights = weights_of(report.model)
    assert all(torch.equal(best_weights[key], value) for key, value in best.items())


def test_by_loss_lower_is_better(fit, monkeypatch):
    scores = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"loss": next(scores), "top1": 1.0, "top5": 1.0}
    )
    assert fit(epochs=3, eval_metric="loss").best_epoch == 2


def test_without_validation(fit):
    report = fit(val_split="")
    assert report.epochs[-1].val_top1 is None
    assert report.best_epoch == min(report.epochs, key=lambda e: e.train_loss).epoch


def test_curves_need_matplotlib_and_nothing_else_does(fit, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    lines = []
    report = fit(say=lines.append)
    assert not (report.folder / "curves.png").exists()
    assert sum("no curves.png: matplotlib" in line for line in lines) == 1


def test_gray_images(fit, images):
    report = fit(epochs=1, in_chans=1)
    saved = read_metadata(report.folder / "model_best.safetensors")["backbones"]
    assert saved["input"]["input_size"] == [1, 32, 32]
    assert len(saved["input"]["mean"]) == 1


def test_any_model_of_timm(fit):
    report = fit(model="resnet10t", model_kwargs={}, epochs=1)
    saved = read_metadata(report.folder / "model_best.safetensors")["backbones"]
    assert saved["name"] == "resnet10t"
    json.dumps(saved)


# Options that are given on resume.


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"weight_decay": 0.3}, {"weight_decay": 0.3}),
        ({"opt_betas": (0.8, 0.9)}, {"betas": (0.8, 0.9)}),
        ({"opt_eps": 1e-5}, {"eps": 1e-5}),
        ({"opt_kwargs": {"amsgrad": False, "betas": (0.7, 0.9)}}, {"betas": (0.7, 0.9)}),
    ],
    ids=lambda value: "-".join(value),
)
def test_options_given_on_resume_hold(fit, monkeypatch, given, found):
    folder = fit(epochs=1).folder
    groups = groups_of_a_resumed_run(monkeypatch, folder, **given)
    decaying = max(groups, key=lambda group: group["weight_decay"])
    for key, value in found.items():
        same = tuple(decaying[key]) if isinstance(value, tuple) else decaying[key]
        assert same == value
    assert min(group["weight_decay"] for group in groups) == 0  # of norms and biases, as before
    written = yaml.safe_load((folder / "args.yaml").read_text())
    for key, value in given.items():
        assert written[key] == (list(value) if isinstance(value, tuple) else written[key])


@pytest.mark.parametrize("sched", ["cosine", "constant"])
def test_a_rate_given_on_resume_holds(fit, monkeypatch, sched):
    folder = fit(epochs=1, sched=sched).folder
    before = groups_of_a_resumed_run(monkeypatch, folder)
    after = groups_of_a_resumed_run(monkeypatch, folder, lr=6e-4)
    assert after[0]["lr"] == pytest.approx(before[0]["lr"] / 10, rel=0.05)


@pytest.mark.parametrize("opt", ["sgd", "lamb", "lion"])
def test_another_optimizer_cannot_go_on(fit, opt):
    folder = fit(epochs=1).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"AdamW is of no use to \w+; leave --opt out"):
        train.run(resume=folder / "last.pth.tar", epochs=2, opt=opt)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_options_that_need_a_state_that_is_not_there(fit):
    folder = fit(epochs=1).folder
    written = (folder / "args.yaml").read_bytes()
    with pytest.raises(CheckpointError, match="state lacks max_exp_avg_sq"):
        train.run(resume=folder / "last.pth.tar", epochs=2, opt_kwargs={"amsgrad": True})
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train.run(resume=folder / "last.pth.tar", epochs=2, layer_decay=0.5)
    assert (folder / "args.yaml").read_bytes() == written


def groups_of_a_resumed_run(monkeypatch, folder, **options):
    """Return the optimizer's groups at the first step of a run that goes on."""
    groups = []

    def stop(trainer, epoch):
        groups.extend(dict(group) for group in trainer.optimizer.param_groups)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            train.run(resume=folder / "last.pth.tar", epochs=2, **options)
    return groups
