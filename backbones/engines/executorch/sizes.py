"""Free height and width of a program: the multiples of the model's stride, up to a bound."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from backbones.engines.formats import Conversion
from backbones.errors import ConfigError
from backbones.reparameterization import backbones_in

__all__ = ["Span", "free_sizes", "known_dims"]

_USUAL_STRIDE = 32  # of models that do not say theirs


@dataclass(frozen=True)
class Span:
    """Sizes along one side: the multiples of `step` from `least` to `most`."""

    least: int
    most: int
    step: int

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most and size % self.step == 0

    def __str__(self) -> str:
        return f"multiples of {self.step} from {self.least} to {self.most}"


def free_sizes(conversion: Conversion, max_size: int | None) -> dict[str, Span]:
    """Return what each free one of height and width may be.

    Other sizes than multiples of the stride would leave operations that depend on the remainder.
    The least is twice the stride, as ``torch.export`` takes a map's side of one for a constant.

    Raises:
        ConfigError: the example is of no such size, or nothing is free and `max_size` is given.
    """
    step = max(
        (part.feature_info[-1]["reduction"] for _, part in backbones_in(conversion.model)),
        default=_USUAL_STRIDE,
    )
    spans = {}
    for axis, name in conversion.axes.items():
        if name == "batch":
            continue
        size = conversion.example.shape[axis]
        most = 2 * size if max_size is None else max_size
        span = spans[name] = Span(2 * step, most - most % step, step)
        if size not in span or span.least == span.most:
            raise ConfigError(
                f"ExecuTorch: a free {name} is one of the {span}, and input_size has {size}; give"
                f" input_size multiples of {step} from {span.least} on, and max_size no smaller"
                f" one and at least {3 * step}"
            )
    if max_size is not None and not spans:
        raise ConfigError(
            "ExecuTorch: max_size bounds a free height or width, and none is free; add them to"
            " dynamic, or leave max_size out"
        )
    return spans


def known_dims(spans: Mapping[str, Span], max_batch: int) -> dict[str, Any]:
    """Return what ``torch.export`` shall know of free dimensions, by name."""
    dims: dict[str, Any] = {"batch": torch.export.Dim("batch", max=max_batch)}
    for name, span in spans.items():
        steps = torch.export.Dim(name, min=span.least // span.step, max=span.most // span.step)
        dims[name] = span.step * steps
    return dims
