"""From a user's model and images to what is converted, run and compared."""

from backbones.engines.preparation.inputs import (
    Images,
    check_input_size,
    input_size_of,
    load_images,
    load_labels,
    load_raw_images,
    random_input,
)
from backbones.engines.preparation.models import (
    DTYPES,
    HALVES,
    PRECISIONS,
    InPrecision,
    contiguous_copy,
    plain_copy,
    prepared,
    reparameterized_copy,
)
from backbones.engines.preparation.preprocessing import Preprocessed, resize_matrix

__all__ = [
    "DTYPES",
    "HALVES",
    "PRECISIONS",
    "Images",
    "InPrecision",
    "Preprocessed",
    "check_input_size",
    "contiguous_copy",
    "input_size_of",
    "load_images",
    "load_labels",
    "load_raw_images",
    "plain_copy",
    "prepared",
    "random_input",
    "reparameterized_copy",
    "resize_matrix",
]
