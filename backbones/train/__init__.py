"""Fine-tuning and validation, on timm's data, task, optimizer, scheduler and saver parts."""

from __future__ import annotations

from backbones.train.config import TrainConfig
from backbones.train.data import eval_loader, open_splits, set_input, train_loader
from backbones.train.evaluation import Evaluation, evaluate
from backbones.train.folders import ImageFolder, image_folder
from backbones.train.images import DataError, open_image
from backbones.train.loop import EpochReport, TrainingError, Update
from backbones.train.recipes import list_recipes, read_options
from backbones.train.run import TrainReport, run

__all__ = [
    "DataError",
    "EpochReport",
    "Evaluation",
    "ImageFolder",
    "TrainConfig",
    "TrainReport",
    "TrainingError",
    "Update",
    "eval_loader",
    "evaluate",
    "image_folder",
    "list_recipes",
    "open_image",
    "open_splits",
    "read_options",
    "run",
    "set_input",
    "train_loader",
]
