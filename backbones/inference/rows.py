"""What is found for one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Prediction", "Row", "embedding_rows", "prediction_rows"]


@dataclass(frozen=True)
class Prediction:
    """A class, its index in the logits, and its probability (0 to 1)."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Row:
    """The likeliest classes of an image, the likeliest first, or its embedding (C,).

    `error` says why an image could not be read; it then has neither. `folder` is the uppermost
    folder below the source, which is the class where images lie in class folders.
    """

    path: str
    predictions: tuple[Prediction, ...] = ()
    embedding: np.ndarray | None = None
    error: str | None = None
    folder: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        facts: dict[str, Any] = {"path": self.path}
        if self.error is not None:
            return facts | {"error": self.error}
        if self.embedding is not None:
            return facts | {"embedding": [float(f"{value:.7g}") for value in self.embedding]}
        found = [
            {"class": one.name, "index": one.index, "probability": one.probability}
            for one in self.predictions
        ]
        return facts | {"predictions": found}


def prediction_rows(
    outputs: Tensor, top_k: int, classes: Sequence[str] | None
) -> list[tuple[Prediction, ...]]:
    """Return the `top_k` likeliest classes of each image of logits (B, classes)."""
    top = outputs.float().softmax(dim=1).topk(min(top_k, outputs.shape[1]))
    return [
        tuple(
            Prediction(classes[i] if classes else f"class {i}", i, float(f"{p:.6g}"))
            for i, p in zip(indices, values)
        )
        for indices, values in zip(top.indices.tolist(), top.values.tolist())
    ]


def embedding_rows(outputs: Tensor) -> list[np.ndarray]:
    """Return the embedding (C,) of each image of outputs (B, C)."""
    return list(outputs.float().cpu().numpy())
