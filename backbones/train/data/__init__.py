"""Images of a run: opening, checking and splitting them, and batches of them."""

from backbones.train.data.digits import write_digits
from backbones.train.data.folders import (
    ImageFolder,
    exclude_bad,
    image_folder,
    open_folder,
    split_folder,
)
from backbones.train.data.images import DataError, find_bad_images, open_image
from backbones.train.data.loaders import eval_loader, set_input, train_loader
from backbones.train.data.splits import Splits, open_splits

__all__ = [
    "DataError",
    "ImageFolder",
    "Splits",
    "eval_loader",
    "exclude_bad",
    "find_bad_images",
    "image_folder",
    "open_folder",
    "open_image",
    "open_splits",
    "set_input",
    "split_folder",
    "train_loader",
    "write_digits",
]
