"""What a run refuses, and that it names the thing, the place and the way out."""

import math
import multiprocessing
import resource
import shutil

import pytest
import torch
from patterns import CLASSES, SMALL, write_patterns
from train_runs import history

import backbones
from backbones import train
from backbones.errors import CheckpointError, ConfigError, UnsafeCheckpointError
from backbones.train import DataError, TrainConfig, TrainingError
from backbones.train.checkpoints import read_training_checkpoint


@pytest.fixture
def own(tmp_path):
    """A copy of the images that a test may spoil."""
    return write_patterns(tmp_path / "own")


def cut(path):
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_folders_that_cannot_be_used(fit, own, tmp_path):
    def refused(words, **more):
        with pytest.raises(DataError, match=words):
            fit(**{"data_dir": str(own), **more})

    refused("nowhere: no such folder", data_dir=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused("no images in it", data_dir=str(tmp_path / "empty"))
    (own / "train" / "up").mkdir()
    refused("no images in up; remove or fill", data_dir=str(own))
    shutil.rmtree(own / "train" / "up")
    shutil.copy(own / "train" / "east" / "00.png", own / "train" / "loose.png")
    refused("outside of class folders: .*loose.png")
    (own / "train" / "loose.png").unlink()
    (own / "val" / "north").rename(own / "val" / "nord")
    refused("classes that training does not have: nord")
    shutil.rmtree(own / "train")
    refused("no split 'train'; it holds val")
    with pytest.raises(ConfigError, match="data_dir is missing"):
        fit(data_dir="")


def test_one_class(fit, tmp_path):
    root = write_patterns(tmp_path / "one", classes=["only"])
    with pytest.raises(DataError, match=r"one class only \(only\)"):
        fit(data_dir=str(root))


def test_bad_images_are_all_named_before_training(fit, own):
    truncated = cut(own / "train" / "east" / "03.png")
    text = own / "val" / "west" / "01.png"
    text.write_text("no image")
    with pytest.raises(DataError) as caught:
        fit(data_dir=str(own))
    message = str(caught.value)
    assert f"{truncated}: damaged or cut short" in message
    assert f"{text}: not an image" in message
    assert "--skip-bad" in message
    lines = []
    report = fit(data_dir=str(own), skip_bad=True, epochs=1, say=lines.append)
    assert [line for line in lines if str(truncated) in line and "left out" in line]
    assert any("47 images of 4 classes" in line for line in lines)
    right = report.epochs[0].val_top1 * 15 / 100  # of 15 images, one was left out
    assert right == pytest.approx(round(right), abs=1e-6)


def test_a_class_of_nothing_but_bad_images(fit, own):
    for path in (own / "train" / "east").iterdir():
        cut(path)
    with pytest.raises(DataError, match="no readable images are left of east"):
        fit(data_dir=str(own), skip_bad=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_go_bad_during_training(fit, own, workers):
    def spoil(update):
        for path in (own / "val").rglob("*.png"):
            cut(path)

    with pytest.raises(DataError, match=r"^\S+\.png: damaged or cut short \(.*\); fetch it again$"):
        fit(data_dir=str(own), workers=workers, progress=spoil)


def test_class_counts(fit, images, tmp_path):
    with pytest.raises(ConfigError, match="num_classes=7, but .* holds 4 classes"):
        fit(num_classes=7)
    first = fit(epochs=1).folder / "model_best.safetensors"
    other = write_patterns(tmp_path / "other", classes=["a", "b", "c"])
    with pytest.raises(CheckpointError, match=r"other classes \(4: .*--pretrained-path"):
        fit(data_dir=str(other), initial_checkpoint=str(first))
    bare = tmp_path / "bare.pth"
    torch.save(backbones.create_model("convnext_atto", num_classes=4, **SMALL).state_dict(), bare)
    with pytest.raises(CheckpointError, match=r"4 classes, the data has 3; --pretrained-path"):
        fit(data_dir=str(other), initial_checkpoint=str(bare))
    assert fit(data_dir=str(other), pretrained_path=str(first), epochs=1).classes == ["a", "b", "c"]


def test_a_resumed_run_needs_its_classes(fit, own):
    folder = fit(data_dir=str(own), epochs=1).folder
    for split in ("train", "val"):
        (own / split / "north").rename(own / split / "northeast")
    with pytest.raises(CheckpointError, match="other classes"):
        train.run(resume=folder / "last.pth.tar", epochs=2)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(fit, monkeypatch, tmp_path):
    from backbones.train.trainer import Trainer

    whole = Trainer.train

    def spoiled(self, epoch):
        if epoch == 1:
            with torch.no_grad():
                self.task.trainable_module.stem[0].weight.fill_(math.inf)
        return whole(self, epoch)

    monkeypatch.setattr(Trainer, "train", spoiled)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 4 \(epoch 2\)"):
        fit(epochs=3)
    folder = tmp_path / "output" / "run"
    last = read_training_checkpoint(folder / "last.pth.tar")
    assert last["epoch"] == 0
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())
    assert [row["epoch"] for row in history(folder)] == ["0"]


def fill_the_disk(options, queue):
    def limit(update):
        if update.epoch == 2:  # no file may grow beyond this from now on
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    try:
        train.run(**options, progress=limit)
    except TrainingError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        queue.put(str(error))


def test_a_full_disk_leaves_the_checkpoint_before(options, tmp_path):
    context = multiprocessing.get_context("spawn")  # a fork has none of OpenMP's other threads
    queue = context.Queue()
    worker = context.Process(target=fill_the_disk, args=(options, queue))
    worker.start()
    message = queue.get(timeout=120)
    worker.join()
    folder = tmp_path / "output" / "run"
    assert "the checkpoint of epoch 2 cannot be written" in message
    assert "last.pth.tar holds the epoch before" in message
    assert read_training_checkpoint(folder / "last.pth.tar")["epoch"] == 0
    assert not list(folder.glob("*tmp*"))
    assert train.run(resume=folder / "last.pth.tar").epochs[0].epoch == 2


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_checkpoints_of_strangers_run_nothing(fit, tmp_path, capsys):
    folder = fit(epochs=1).folder
    content = torch.load(folder / "last.pth.tar", weights_only=False)
    torch.save({**content, "optimizer": {**content["optimizer"], "x": Evil()}}, tmp_path / "evil")
    with pytest.raises(UnsafeCheckpointError, match="print"):
        train.run(resume=tmp_path / "evil")
    assert "run" not in capsys.readouterr().out.split()

    def refused(changed, words):
        torch.save(
            {k: v for k, v in {**content, **changed}.items() if v is not None}, tmp_path / "x"
        )
        with pytest.raises(CheckpointError, match=words):
            train.run(resume=tmp_path / "x", epochs=2)

    refused({"optimizer": None}, "no checkpoint of a training run")
    refused({"args": None}, "does not say which run it is of")
    state = dict(content["state_dict"])
    del state["stem.0.weight"]
    refused({"state_dict": state}, "does not fit this run")
    endless = {}
    endless["self"] = endless
    refused({"more": endless}, "nested without end")
    with pytest.raises(CheckpointError, match="weights alone"):
        train.run(resume=folder / "model_best.safetensors")
    with pytest.raises(FileNotFoundError):
        train.run(resume=tmp_path / "nothing.pth.tar")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"smoothing": 1.0}, "smoothing must be below 1"),
        ({"hflip": 1.5}, "hflip must be between 0 and 1"),
        ({"scale": (1.0, 0.5)}, "scale takes two rising numbers"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
    ],
)
def test_values_outside_of_their_range(options, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'"),
        ({"naflex_loader": True}, "python -m backbones.train.launch"),
        ({"lr": "fast"}, "lr must be a number or null, got 'fast'"),
        ({"opt": "adamwx"}, "optimizer 'adamwx'"),
        ({"model": ""}, "model is missing"),
        ({"recipe": "lsnet_finetun"}, "did you mean"),
        ({"model_kwargs": {"depth": 3}}, "cannot be created: .*depth"),
        ({"mixup": 0.5, "batch_size": 15}, "even batch_size"),
        ({"warmup_epochs": 2}, "over half of epochs"),
        ({"device": "tpu9"}, "device 'tpu9'"),
        ({"sync_bn": True}, "sync_bn needs GPUs"),
        ({"aux_loss_weight": 0.4}, "cannot be trained in this way"),
        ({"kd_checkpoint": "x"}, "kd_checkpoint needs kd_model_name"),
        ({"kd_model_name": "convnext_atto", "aux_loss_weight": 1.0}, "exclude each other"),
        ({"initial_checkpoint": "a", "pretrained_path": "b"}, "exclude each other"),
        ({"dataset": "torch/nothing"}, "torch/nothing"),
        ({"dataset": "nope"}, "no dataset reader 'nope'"),
        ({"mean": (0.5, 0.5)}, "mean must be one number or 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "-",
)
def test_options_that_cannot_be(fit, more, words):
    with pytest.raises(backbones.BackbonesError, match=words):
        fit(**more)


def test_what_is_held_out_is_the_same_each_time(fit, tmp_path):
    root = write_patterns(tmp_path / "flat", counts=[("train", 10)]) / "train"
    lines = []
    report = fit(data_dir=str(root), epochs=1, say=lines.append)
    assert report.classes == sorted(CLASSES)
    assert any("8 of 40 are held out" in line for line in lines)
    config = TrainConfig(data_dir=str(root))
    first, second = train.open_splits(config), train.open_splits(config)
    assert first.val.samples == second.val.samples
    held_out, rest = ({path for path, _ in d.samples} for d in (first.val, first.train))
    assert not held_out & rest
    assert len(held_out | rest) == 40
    assert {label for _, label in first.val.samples} == {0, 1, 2, 3}


def test_other_readers_of_timm(fit, images, tmp_path):
    report = fit(dataset="torch/image_folder", epochs=1)
    assert report.classes == sorted(CLASSES)
    tar = shutil.make_archive(str(tmp_path / "images"), "tar", images / "train")
    assert fit(data_dir=tar, val_split="", epochs=1).classes == sorted(CLASSES)
    with pytest.raises(DataError, match="are the same images"):
        fit(dataset="torch/image_folder", data_dir=str(images / "train"), epochs=1)
