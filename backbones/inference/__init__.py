"""A model over a collection of images, in any engine: predictions and embeddings, row by row."""

from backbones.inference.explaining import Explainer
from backbones.inference.formats import FORMATS
from backbones.inference.models import OpenModel, class_names
from backbones.inference.prediction import embed, predict
from backbones.inference.rows import Prediction, Row
from backbones.inference.saving import Summary, save_predictions
from backbones.inference.sheet import Sheet
from backbones.inference.sources import Item, Source, open_source

__all__ = [
    "FORMATS",
    "Explainer",
    "Item",
    "OpenModel",
    "Prediction",
    "Row",
    "Sheet",
    "Source",
    "Summary",
    "class_names",
    "embed",
    "open_source",
    "predict",
    "save_predictions",
]
