"""Checkpoints of a run: timm's layout, written whole or not at all, read without running code."""

import argparse
import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
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
from backbones.train.trainer import TrainingError
from backbones.weights import read_content

__all__ = [
    "LAST",
    "Checkpoints",
    "check_classes",
    "check_optimizer",
    "options_of",
    "read_training_checkpoint",
    "restore",
    "resumed_options",
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
    """Read a checkpoint of `Checkpoints` or of timm's training script.

    Raises:
        CheckpointError: it cannot be read safely, or no run can be continued from it.
    """
    content = read_content(path)
    missing = [key for key in ("epoch", "optimizer", "state_dict") if key not in content]
    if missing or not isinstance(content["optimizer"], Mapping):
        raise CheckpointError(
            f"{path}: no checkpoint of a training run (it lacks {', '.join(missing) or 'a state'});"
            " --initial-checkpoint or --pretrained-path start a new run from weights"
        )
    return dict(content)


def options_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options and facts that a training checkpoint holds."""
    args = content.get("args")
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else {}


def resumed_options(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the options of the run, ours or timm's, that wrote a checkpoint; its folder stays.

    Raises:
        CheckpointError: it does not hold them.
    """
    # timm's script writes more options than ours, and '' where ours have None.
    hints = option_types()
    options = options_of(content).items()
    saved = {key: value for key, value in options if key in hints and fits(value, hints[key])}
    if not saved.get("model"):
        raise CheckpointError(f"{path}: does not say which run it is of (it holds no args)")
    return {**saved, "output": str(path.parent.parent), "experiment": path.parent.name}


def check_classes(content: Mapping[str, Any], classes: list[str] | None, data_dir: str) -> None:
    """Refuse to go on with other classes.

    Raises:
        CheckpointError: the run was on others than `classes`.
    """
    before = options_of(content).get("classes")
    if before and classes and list(before) != classes:
        raise CheckpointError(
            f"the run was on other classes ({len(before)}: {', '.join(before[:5])}, ...) than"
            f" {data_dir} holds now ({len(classes)}: {', '.join(classes[:5])}, ...)"
        )


def check_optimizer(
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    before: Optimizer,
    now: Optimizer,
    probe: Callable[[nn.Module], Optimizer],
) -> None:
    """Refuse to go on with an optimizer that does not know the state of the run's own.

    Args:
        content: that of the checkpoint at `path`.
        before: an optimizer by the options of the run so far.
        now: the one to go on with.
        probe: gives one like `now` for another module, on which it may take a step.

    Raises:
        CheckpointError: it is of another kind, or misses a part of its state.
    """
    way_out = f"start a new run from its weights (--initial-checkpoint {path})"
    kinds = [type(optimizer).__name__ for optimizer in (before, now)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{path}: the state of {kinds[0]} is of no use to {kinds[1]}; leave --opt out or"
            f" {way_out}"
        )
    saved = {key for state in content["optimizer"]["state"].values() for key in state}
    if not saved or _hyperparameters(before) == _hyperparameters(now):
        return
    module = nn.Linear(2, 2)
    optimizer = probe(module)
    module(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    missing = {key for state in optimizer.state.values() for key in state} - saved
    if missing:
        raise CheckpointError(
            f"{path}: the optimizer's state lacks {', '.join(sorted(missing))}, which these"
            f" options need; leave them out or {way_out}"
        )


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group of parameters, but for the rates."""
    others = ("params", *_RATES)
    groups = optimizer.param_groups
    return [{key: value for key, value in group.items() if key not in others} for group in groups]


def restore(
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    task: TrainingTask,
    optimizer: Optimizer,
    scaler: NativeScaler | None,
    *,
    before: Optimizer,
) -> int:
    """Put a checkpoint's state into a task and its optimizer; return the epoch to go on with.

    Options in which the optimizer differs from `before`, one by the options of the run so far,
    hold over the saved ones.

    The average of the weights, if the task has one, is taken from the checkpoint, or else begins
    with the checkpoint's weights.

    Raises:
        CheckpointError: the state does not fit.
    """
    try:
        task.load_checkpoint_state(content["state_dict"], content.get("task_state"))
        rates = [{k: group[k] for k in _RATES if k in group} for group in optimizer.param_groups]
        olds, news = _hyperparameters(before), _hyperparameters(optimizer)
        optimizer.load_state_dict(content["optimizer"])
        for group, rate, old, new in zip(optimizer.param_groups, rates, olds, news):
            group |= rate | {key: value for key, value in new.items() if old.get(key) != value}
        if scaler is not None and scaler.state_dict_key in content:
            scaler.load_state_dict(content[scaler.state_dict_key])
        if task.has_ema():
            average = content.get("state_dict_ema") or content["state_dict"]
            task.load_checkpoint_state(average, content.get("task_state_ema"), ema=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit this run ({first_line(error)})") from error
    return int(content["epoch"]) + 1
