"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, random_seed
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from backbones.errors import BackbonesError
from backbones.train.config import TrainConfig
from backbones.train.evaluation import Evaluation, evaluate
from backbones.train.images import DataError

__all__ = ["EpochReport", "TrainReport", "TrainingError", "Update", "fit"]


class TrainingError(BackbonesError, RuntimeError):
    """Training cannot go on; the message names epoch and step."""


@dataclass(frozen=True)
class Update:
    """What happened in one optimizer step; epochs and steps count from 1."""

    epoch: int
    step: int
    steps: int  # of the whole run
    loss: float  # mean of the epoch so far
    lr: float


@dataclass(frozen=True)
class EpochReport:
    """One line of a run's history: mean training loss, and validation where it was asked for."""

    epoch: int
    lr: float
    train_loss: float
    seconds: float
    val_loss: float | None = None
    val_top1: float | None = None


@dataclass(frozen=True)
class TrainReport:
    """History of a run, and the last epoch's validation."""

    epochs: list[EpochReport]
    seconds: float
    evaluation: Evaluation | None


def fit(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader | None,
    config: TrainConfig,
    progress: Callable[[Update], None] | None = None,
) -> TrainReport:
    """Train `model` in place, on the device it is on, and leave it in eval mode.

    Args:
        model: the model.
        train_loader: training batches (images, class indices).
        val_loader: run after every epoch; None for none.
        config: optimizer, schedule, loss and seed.
        progress: called after every optimizer step.

    Raises:
        DataError: the training loader is empty.
        TrainingError: the loss is not finite.
    """
    if len(train_loader) == 0:
        raise DataError("nothing to train on: the training split is smaller than one batch")
    random_seed(config.seed)
    optimizer = create_optimizer_v2(
        model,
        opt=config.opt,
        lr=config.lr,
        weight_decay=config.weight_decay,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    device = next(model.parameters()).device
    steps, start, history = config.epochs * len(train_loader), time.perf_counter(), []
    evaluation: Evaluation | None = None
    done = 0
    for epoch in range(1, config.epochs + 1):
        epoch_start, losses = time.perf_counter(), AverageMeter()
        model.train()
        for images, targets in train_loader:
            if scheduler is not None:
                scheduler.step_update(done)
            loss = criterion(model(images.to(device)), targets.to(device))
            value = float(loss.detach())
            done += 1
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {done} (epoch {epoch}); lower lr={config.lr}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(value, len(targets))
            if progress is not None:
                progress(Update(epoch, done, steps, losses.avg, learning_rate(optimizer)))
        evaluation = evaluate(model, val_loader) if val_loader is not None else None
        history.append(
            EpochReport(
                epoch,
                learning_rate(optimizer),
                losses.avg,
                time.perf_counter() - epoch_start,
                evaluation.loss if evaluation else None,
                evaluation.top1 if evaluation else None,
            )
        )
    model.eval()
    return TrainReport(history, time.perf_counter() - start, evaluation)


def learning_rate(optimizer: Optimizer) -> float:
    """Return the highest learning rate of the parameter groups."""
    return max(group["lr"] for group in optimizer.param_groups)
