"""Images of a run: opening, checking and splitting them, and batches of them."""

from backbones.train.data.digits import write_digits
from backbones.train.data.folders import (
    ImageFolder,
    exclude_bad,
    find_split,
    image_folder,
    open_folder,
)
from backbones.train.data.loaders import eval_loader, set_input, train_loader
from backbones.train.data.splits import Splits, open_splits

__all__ = [
    "ImageFolder",
    "Splits",
    "eval_loader",
    "exclude_bad",
    "find_split",
    "image_folder",
    "open_folder",
    "open_splits",
    "set_input",
    "train_loader",
    "write_digits",
]
