"""One epoch of training, and one of validation."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from timm.data import Mixup
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.optim import Optimizer

from backbones.errors import BackbonesError
from backbones.skeleton import StagedBackbone
from backbones.train.config import TrainConfig
from backbones.train.convolutions import cpu_convolutions
from backbones.train.distributed import ProcessGroup

__all__ = ["EpochReport", "Trainer", "TrainingError", "Update", "learning_rate"]


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
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EpochReport:
    """One line of a run's history: mean training loss, and validation where there is any."""

    epoch: int
    lr: float
    train_loss: float
    seconds: float
    val_loss: float | None = None
    val_top1: float | None = None
    val_top5: float | None = None


@dataclass
class Trainer:
    """Everything that an epoch needs; `frozen` modules stay in eval mode, so that their statistics
    stay what they are."""

    config: TrainConfig
    group: ProcessGroup
    task: TrainingTask
    optimizer: Optimizer
    scheduler: Any
    train_batches: Any
    val_batches: Any | None
    scaler: NativeScaler | None = None
    mixup: Mixup | None = None
    frozen: Sequence[nn.Module] = ()
    progress: Callable[[Update], None] | None = None
    epochs: int = 0
    _start: tuple[float, int] = field(default=(0.0, 0), init=False)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.train_batches) / self.config.grad_accum_steps)

    def train(self, epoch: int) -> float:
        """Train one epoch (from 0) and return its mean loss over all processes.

        Raises:
            TrainingError: the loss is not finite; the step was not taken.
        """
        config, task = self.config, self.task
        module = task.get_trainable_module()
        module.train()
        for part in self.frozen:
            part.eval()
        if self.mixup is not None and config.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < config.mixup_off_epoch
        backbones = [part for part in module.modules() if isinstance(part, StagedBackbone)]
        total, count = 0.0, 0
        update = epoch * self.updates_per_epoch
        if self._start == (0.0, 0):
            self._start = (time.perf_counter(), update)
        images_done, batches = 0, len(self.train_batches)
        self.optimizer.zero_grad()
        for index, (images, targets) in enumerate(self.train_batches):
            first = index - index % config.grad_accum_steps
            members = min(config.grad_accum_steps, batches - first)
            last = index - first == members - 1
            with nullcontext() if last else task.no_sync():
                loss = self._forward(images, targets)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingError(
                        f"the loss is {value} at step {update + 1} (epoch {epoch + 1}); lower the"
                        " learning rate, or switch amp off"
                    )
                self._backward(loss / members, step=last)
            total, count = total + value * len(images), count + len(images)
            images_done += len(images) * self.group.size
            if not last:
                continue
            update += 1
            self.optimizer.zero_grad()
            for backbone in backbones:
                backbone.clamp_parameters()
            task.update_ema(step=update)
            if self.scheduler is not None:
                self.scheduler.step_update(num_updates=update)
            if self.progress is not None:
                self.progress(self._report(epoch, update, total / count, images_done))
            images_done = 0
        if self.group.distributed and config.dist_bn and not config.sync_bn:
            for ema in (False, True) if task.has_ema() else (False,):
                module = task.get_trainable_module(ema=ema)
                distribute_bn(module, self.group.size, config.dist_bn == "reduce")
        return self.group.mean(total / count)

    def validate(self) -> dict[str, float] | None:
        """Return loss, top-1 and top-5 (percent) on the validation images, of the average if there
        is one; None without such images."""
        if self.val_batches is None:
            return None
        model = self.task.get_eval_model(ema=self.task.has_ema())
        model.eval()
        evaluator = self.task.create_evaluator(
            max_samples=evaluation_sample_limit(self.val_batches)
        )
        with torch.inference_mode():
            for images, targets in self.val_batches:
                with self._autocast():
                    output = model(self._placed(images))
                evaluator.update(output, targets.to(self.group.device))
        return dict(evaluator.compute(distributed=self.group.distributed))

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        images, targets = self._placed(images), targets.to(self.group.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self._convolutions, self._autocast():
            return self.task(images, targets)["loss"]

    def _backward(self, loss: Tensor, *, step: bool) -> None:
        config = self.config
        bound, mode, parameters = config.clip_grad, config.clip_mode, None
        if bound is not None:
            parameters = self.task.get_clip_parameters(exclude_head=mode == "agc")
        if self.scaler is not None:
            clipping = {"clip_grad": bound, "clip_mode": mode, "parameters": parameters}
            self.scaler(loss, self.optimizer, **clipping, need_update=step)
            return
        loss.backward()
        if step:
            if bound is not None:
                dispatch_clip_grad(parameters, value=bound, mode=mode)
            self.optimizer.step()

    def _placed(self, images: Tensor) -> Tensor:
        images = images.to(self.group.device, non_blocking=True)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images

    def _autocast(self) -> Any:
        if not self.config.amp:
            return nullcontext()
        return torch.autocast(self.group.device.type, getattr(torch, self.config.amp_dtype))

    @cached_property
    def _convolutions(self) -> AbstractContextManager[object]:
        return cpu_convolutions(self.task.get_trainable_module())

    def _report(self, epoch: int, update: int, loss: float, images: int) -> Update:
        started, first = self._start
        seconds = (time.perf_counter() - started) / (update - first)
        steps, rate = self.epochs * self.updates_per_epoch, learning_rate(self.optimizer)
        left = (steps - update) * seconds
        return Update(epoch + 1, update, steps, loss, rate, images / seconds, left)


def learning_rate(optimizer: Optimizer) -> float:
    """Return the highest learning rate of the parameter groups."""
    return max(group["lr"] for group in optimizer.param_groups)
