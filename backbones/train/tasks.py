"""The training task: a model with its losses, as timm's `TrainingTask`."""

from __future__ import annotations

from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import Tensor, nn

from backbones.errors import ConfigError
from backbones.factory import create_model
from backbones.train.config import TrainConfig
from backbones.weights import read_description

__all__ = ["AuxiliaryHeadTask", "create_task"]


class AuxiliaryHeadTask(ClassificationTask):
    """Classification with a second classifier whose loss counts `weight`.

    Args:
        model: one whose training forward gives (logits, auxiliary logits) after timm's
            ``set_distilled_training(True)``.
        weight: of the auxiliary loss.
        common: timm's arguments.
    """

    def __init__(self, model: nn.Module, *, weight: float, **common: Any) -> None:
        super().__init__(model, **common)
        self.weight = weight
        model.set_distilled_training(True)  # type: ignore[operator]

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        output, auxiliary = self.trainable_module(input)
        loss = self.criterion(output, target)
        auxiliary_loss = self.criterion(auxiliary, target)
        return {
            "loss": loss + self.weight * auxiliary_loss,
            "output": output,
            "auxiliary_loss": auxiliary_loss,
        }


def create_task(
    model: nn.Module,
    config: TrainConfig,
    device: torch.device,
    *,
    num_classes: int,
    classes: list[str] | None = None,
) -> TrainingTask:
    """Return the task that a config describes.

    Args:
        model: the model to train, on its device.
        config: loss, distillation, auxiliary head.
        device: where it trains.
        num_classes: width of the classifier, which a teacher of logits must share.
        classes: names of the classes, which a teacher's must equal where both are known.

    Raises:
        ConfigError: what is asked for excludes itself, or the model or teacher cannot do it.
    """
    losses: dict[str, Any] = {
        "loss_type": "bce" if config.bce_loss else "ce",
        "smoothing": config.smoothing,
        "soft_targets": config.mixes,
    }
    common: dict[str, Any] = {"criterion_kwargs": losses, "device": device, "verbose": False}
    if config.aux_loss_weight and config.kd_model_name:
        raise ConfigError("aux_loss_weight and kd_model_name exclude each other; drop one")
    try:
        if config.aux_loss_weight:
            return AuxiliaryHeadTask(model, weight=config.aux_loss_weight, **common)
        if config.kd_model_name is None:
            return ClassificationTask(model, **common)
        teacher = _teacher(config, num_classes, classes).to(device)
        common |= {
            "teacher_model": teacher,
            "distill_loss_weight": config.distill_loss_weight,
            "task_loss_weight": config.task_loss_weight,
        }
        if config.kd_distill_type == "feature":
            return FeatureDistillationTask(model, **common)
        common["temperature"] = config.kd_temperature
        if config.kd_distill_type == "token":
            return TokenDistillationTask(model, **common)
        return LogitDistillationTask(model, **common)
    # What a model without a second head says, ours and timm's.
    except (AttributeError, NotImplementedError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{config.model} cannot be trained in this way: {error}") from error


def _teacher(config: TrainConfig, num_classes: int, classes: list[str] | None) -> nn.Module:
    """Return the teacher in eval mode."""
    name, checkpoint = str(config.kd_model_name), config.kd_checkpoint
    known: list[str] | None = None
    arguments: dict[str, Any] = {} if config.in_chans is None else {"in_chans": config.in_chans}
    if checkpoint is None:
        teacher = create_model(name, pretrained=True, **arguments)
    else:
        teacher = create_model(name, checkpoint_path=checkpoint, **arguments)
        known = read_description(checkpoint).get("classes")
    if config.kd_distill_type != "feature":
        if teacher.num_classes != num_classes:
            raise ConfigError(
                f"the teacher {name} knows {teacher.num_classes} classes, the data {num_classes};"
                " fine-tune it on the data first (kd_checkpoint), or distill features"
            )
        if known and classes and list(known) != list(classes):
            raise ConfigError(f"the teacher of {checkpoint} was trained on other classes")
    return teacher.eval().requires_grad_(False)
