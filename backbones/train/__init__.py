"""Fine-tuning and validation, on timm's data, optimizer and scheduler parts."""

from __future__ import annotations

from backbones.train.config import TrainConfig
from backbones.train.data import ImageFolder, eval_loader, image_folder, set_input, train_loader
from backbones.train.evaluation import Evaluation, evaluate
from backbones.train.images import DataError, open_image
from backbones.train.loop import TrainingError, TrainReport, Update, fit

__all__ = [
    "DataError",
    "Evaluation",
    "ImageFolder",
    "TrainConfig",
    "TrainReport",
    "TrainingError",
    "Update",
    "eval_loader",
    "evaluate",
    "fit",
    "image_folder",
    "open_image",
    "set_input",
    "train_loader",
]
