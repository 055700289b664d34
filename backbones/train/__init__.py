"""Fine-tuning and validation, on timm's data, task, optimizer, scheduler and saver parts."""

from backbones.errors import DataError
from backbones.images import find_bad_images, open_image
from backbones.train.config import TrainConfig
from backbones.train.convolutions import cpu_convolutions
from backbones.train.data import (
    ImageFolder,
    eval_loader,
    image_folder,
    open_splits,
    set_input,
    train_loader,
    write_digits,
)
from backbones.train.fine_tuning import run
from backbones.train.initial_weights import InitialWeights
from backbones.train.plots import draw_predictions
from backbones.train.probing import Probe, probe
from backbones.train.recipes import list_recipes, read_options
from backbones.train.trainer import EpochReport, TrainingError, Update
from backbones.train.training_run import BEST, CURVES, TrainReport
from backbones.train.validation import (
    Evaluation,
    Validation,
    evaluate,
    validate,
    write_validation,
)

__all__ = [
    "BEST",
    "CURVES",
    "DataError",
    "EpochReport",
    "Evaluation",
    "ImageFolder",
    "InitialWeights",
    "Probe",
    "TrainConfig",
    "TrainReport",
    "TrainingError",
    "Update",
    "Validation",
    "cpu_convolutions",
    "draw_predictions",
    "eval_loader",
    "evaluate",
    "find_bad_images",
    "image_folder",
    "list_recipes",
    "open_image",
    "open_splits",
    "probe",
    "read_options",
    "run",
    "set_input",
    "train_loader",
    "validate",
    "write_digits",
    "write_validation",
]
