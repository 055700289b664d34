"""What a run computes for a batch: the losses, a teacher's and those of an auxiliary head."""

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
from backbones.factory import create_model, load_model
from backbones.train.config import TrainConfig

__all__ = ["AuxiliaryHeadTask", "create_task"]

DISTILLATION = {
    "logit": LogitDistillationTask,
    "feature": FeatureDistillationTask,
    "token": TokenDistillationTask,
}


class AuxiliaryHeadTask(ClassificationTask):
    """Classification with a second classifier whose loss counts `weight`, for a model whose
    training forward gives (logits, auxiliary logits) after ``set_distilled_training(True)``."""

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
    """Return the task that a config describes: loss, distillation, auxiliary head.

    A teacher of logits must share `num_classes`, and `classes` where both are known. What cannot be
    done is a ConfigError.
    """
    losses: dict[str, Any] = {
        "loss_type": "bce" if config.bce_loss else "ce",
        "smoothing": config.smoothing,
        "soft_targets": config.mixes,
    }
    common: dict[str, Any] = {"criterion_kwargs": losses, "device": device, "verbose": False}
    if config.aux_loss_weight and config.kd_model_name:
        raise ConfigError("aux_loss_weight and kd_model_name exclude each other; drop one")
    if config.kd_model_name:
        common |= {
            "teacher_model": _teacher(config, num_classes, classes).to(device),
            "distill_loss_weight": config.distill_loss_weight,
            "task_loss_weight": config.task_loss_weight,
        }
        if config.kd_distill_type != "feature":
            common["temperature"] = config.kd_temperature
    try:
        if config.aux_loss_weight:
            return AuxiliaryHeadTask(model, weight=config.aux_loss_weight, **common)
        if config.kd_model_name:
            return DISTILLATION[config.kd_distill_type](model, **common)
        return ClassificationTask(model, **common)
    # What a model without a second head says, ours and timm's.
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ConfigError(f"{config.model} cannot be trained in this way: {error}") from error


def _teacher(config: TrainConfig, num_classes: int, classes: list[str] | None) -> nn.Module:
    """Return the teacher in eval mode."""
    name, checkpoint = str(config.kd_model_name), config.kd_checkpoint
    arguments: dict[str, Any] = {} if config.in_chans is None else {"in_chans": config.in_chans}
    if checkpoint:
        teacher = load_model(checkpoint, name, **arguments)
    else:
        teacher = create_model(name, pretrained=True, **arguments)
    known = getattr(teacher, "pretrained_cfg", {}).get("label_names") if checkpoint else None
    if config.kd_distill_type != "feature":
        if teacher.num_classes != num_classes:
            raise ConfigError(
                f"the teacher {name} knows {teacher.num_classes} classes, the data {num_classes};"
                " fine-tune it on the data first (kd_checkpoint), or distill features"
            )
        if known and classes and list(known) != list(classes):
            raise ConfigError(f"the teacher of {checkpoint} was trained on other classes")
    return teacher.eval().requires_grad_(False)
