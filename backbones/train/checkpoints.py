"""Checkpoints of a run: timm's layout, written whole or not at all, read without running code."""

import argparse
import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, NativeScaler, unwrap_model
from torch import nn
from torch.optim import Optimizer

from backbones.errors import CheckpointError, first_line
from backbones.files import new_file
from backbones.schema import fits
from backbones.train.config import TrainConfig, option_types
from backbones.train.setup import create_optimizer
from backbones.train.trainer import Trainer, TrainingError
from backbones.weights import read_content

__all__ = [
    "LAST",
    "Checkpoints",
    "SavedRun",
    "read_training_checkpoint",
    "uninterrupted",
]

LAST = "last.pth.tar"
_RATES = ("lr", "initial_lr")  # a group's, which follow the schedule


class Checkpoints(CheckpointSaver):
    """timm's saver, which keeps the best epochs, the last one and ``model_best.pth.tar``.

    A checkpoint replaces an older one only when it is complete on the disk, so that a full disk or
    an interrupt leaves the older one as it was. Each holds the options (`config`) and what else a
    later run must know (`facts`): class names, and which weights this one began with.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        facts: Mapping[str, Any],
        task: TrainingTask,
        optimizer: Optimizer,
        scaler: NativeScaler | None = None,
    ) -> None:
        super().__init__(
            model=unwrap_model(task.get_trainable_module()),
            optimizer=optimizer,
            args=argparse.Namespace(**dataclasses.asdict(config), **facts),
            amp_scaler=scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=config.eval_metric == "loss",
            max_history=config.checkpoint_hist,
            task=task,
        )
        self.folder = folder

    def save(self, epoch: int, metric: float | None) -> bool:
        """Save an epoch (from 0; -1 for the state before the first); tell whether it is the best.

        Raises:
            TrainingError: the disk is full or cannot be written; older checkpoints are intact.
        """
        try:
            if epoch < 0:
                with new_file(self.folder / LAST) as file:
                    self._save(str(file), epoch)
            else:
                self.save_checkpoint(epoch, metric)
        except (OSError, RuntimeError) as error:
            (self.folder / f"tmp{self.extension}").unlink(missing_ok=True)  # timm's
            last = self.folder / LAST
            intact = f"; {last} holds the epoch before" if last.exists() else ""
            raise TrainingError(
                f"{self.folder}: the checkpoint of epoch {epoch + 1} cannot be written"
                f" ({first_line(error)}); free some space and --resume{intact}"
            ) from error
        return metric is not None and self.best_epoch == epoch


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done; elsewhere than in the main thread, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def read_training_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of `Checkpoints` or of timm's training script."""
    content = read_content(path)
    missing = [key for key in ("epoch", "optimizer", "state_dict") if key not in content]
    if missing or not isinstance(content["optimizer"], Mapping):
        raise CheckpointError(
            f"{path}: no checkpoint of a training run (it lacks {', '.join(missing) or 'a state'});"
            " --initial-checkpoint or --pretrained-path start a new run from weights"
        )
    return dict(content)


class SavedRun:
    """The checkpoint of a run to go on with, ours or that of timm's training script.

    `options` are those of the run, whose folder stays; `facts` also hold what else is known of it.

    Raises:
        CheckpointError: it cannot be read safely, no run can be continued from it, or it does not
            say which run it is of.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.content = Path(path), read_training_checkpoint(path)
        args = self.content.get("args")
        self.facts: dict[str, Any] = {**vars(args)} if isinstance(args, argparse.Namespace) else {}
        # timm's script writes more options than ours, and '' where ours have None.
        hints, facts = option_types(), self.facts.items()
        self.options = {
            key: value for key, value in facts if key in hints and fits(value, hints[key])
        }
        if not self.options.get("model"):
            raise CheckpointError(f"{path}: does not say which run it is of (it holds no args)")
        folder = self.path.parent
        self.options |= {"output": str(folder.parent), "experiment": folder.name}

    def check_classes(self, classes: list[str] | None, data_dir: str) -> None:
        """Refuse to go on with other classes, by CheckpointError."""
        before = self.facts.get("classes")
        if before and classes and list(before) != classes:
            raise CheckpointError(
                f"the run was on other classes ({len(before)}: {', '.join(before[:5])}, ...) than"
                f" {data_dir} holds now ({len(classes)}: {', '.join(classes[:5])}, ...)"
            )

    def restore(self, trainer: Trainer) -> int:
        """Put the state in place and return the epoch to go on with.

        Options in which the optimizer differs from that of the run so far hold over the saved ones.
        The average of the weights, if there is one, is taken from the checkpoint, or else begins
        with the checkpoint's weights. A state that does not fit is a CheckpointError.
        """
        content, task, optimizer = self.content, trainer.task, trainer.optimizer
        past = dataclasses.replace(trainer.config, **self.options)
        lr = optimizer.param_groups[0]["lr"]
        before = create_optimizer(task.get_trainable_module(), past, lr)
        self._check_optimizer(before, optimizer, trainer.config)
        try:
            task.load_checkpoint_state(content["state_dict"], content.get("task_state"))
            rates = [{k: g[k] for k in _RATES if k in g} for g in optimizer.param_groups]
            olds, news = _hyperparameters(before), _hyperparameters(optimizer)
            optimizer.load_state_dict(content["optimizer"])
            for group, rate, old, new in zip(optimizer.param_groups, rates, olds, news):
                group |= rate | {key: value for key, value in new.items() if old.get(key) != value}
            scaler = trainer.scaler
            if scaler is not None and scaler.state_dict_key in content:
                scaler.load_state_dict(content[scaler.state_dict_key])
            if task.has_ema():
                average = content.get("state_dict_ema") or content["state_dict"]
                task.load_checkpoint_state(average, content.get("task_state_ema"), ema=True)
        except (KeyError, RuntimeError, ValueError) as error:
            message = f"{self.path}: does not fit this run ({first_line(error)})"
            raise CheckpointError(message) from error
        return int(content["epoch"]) + 1

    def _check_optimizer(self, before: Optimizer, now: Optimizer, config: TrainConfig) -> None:
        """Refuse an optimizer of another kind than `before`, or that misses a part of its state."""
        way_out = f"start a new run from its weights (--initial-checkpoint {self.path})"
        kinds = [type(optimizer).__name__ for optimizer in (before, now)]
        if kinds[0] != kinds[1]:
            raise CheckpointError(
                f"{self.path}: the state of {kinds[0]} is of no use to {kinds[1]}; leave --opt out"
                f" or {way_out}"
            )
        saved = {key for state in self.content["optimizer"]["state"].values() for key in state}
        if not saved or _hyperparameters(before) == _hyperparameters(now):
            return
        module = nn.Linear(2, 2)  # after one step, its optimizer's state has all parts
        probe = create_optimizer(module, config, now.param_groups[0]["lr"])
        module(torch.ones(2, 2)).sum().backward()
        probe.step()
        missing = {key for state in probe.state.values() for key in state} - saved
        if missing:
            raise CheckpointError(
                f"{self.path}: the optimizer's state lacks {', '.join(sorted(missing))}, which"
                f" these options need; leave them out or {way_out}"
            )


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group of parameters, but for the rates."""
    others = ("params", *_RATES)
    groups = optimizer.param_groups
    return [{key: value for key, value in group.items() if key not in others} for group in groups]
