"""Ranges of activations: what 8 bits shall tell apart, and what they may cut off."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["Range", "Statistics", "least_squares", "quantized_activation", "quantized_weight"]

Range = tuple[float, float]
BINS = 2048
STEPS = 40  # candidates for each end of a range
LEVELS = 255  # steps between 256 values


@dataclass
class Statistics:
    """The values of named tensors, batch by batch: first their ends, then how often each occurs."""

    ends: dict[str, Range] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add_ends(self, name: str, x: Tensor) -> None:
        """Widen the range of a tensor to what is in it, and to zero, which int8 must hit."""
        low, high = (float(end) for end in x.detach().aminmax())
        before = self.ends.get(name, (0.0, 0.0))
        self.ends[name] = min(low, before[0]), max(high, before[1])

    def add_counts(self, name: str, x: Tensor) -> None:
        """Count the values of a tensor whose ends are known."""
        found = torch.histc(x.detach().float(), BINS, *self.ends[name])
        self.counts[name] = self.counts.get(name, 0) + found.double()

    def ranges(self, kinds: Mapping[str, int] | None = None) -> dict[str, Range]:
        """Return the range of each value: that of its kind (see `candidates`), or of all of it."""
        if kinds is None:
            return dict(self.ends)
        return {name: self.candidates(name)[kind] for name, kind in kinds.items()}

    def candidates(self, name: str) -> tuple[Range, ...]:
        """Return ranges to choose from: all values, between the others, the least squared error.

        What is cut off makes the rest finer, and images wrong that have more of it. Without counts
        there is the first alone.
        """
        (low, high) = ends = self.ends[name]
        if name not in self.counts:
            return (ends,)
        least = least_squares(self.counts[name].numpy(), ends)
        return ends, ((low + least[0]) / 2, (high + least[1]) / 2), least


def least_squares(counts: np.ndarray, ends: Range) -> Range:
    """Return the range whose 256 values are nearest to a histogram, in the mean square.

    Values within it are rounded, uniformly within half a step; those beyond are cut off at its end.
    Ends are moved in turn: first the one farther from zero.
    """
    low, high = ends
    centers = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)

    def error(low: float, high: float) -> float:
        beyond = np.maximum(low - centers, 0) + np.maximum(centers - high, 0)
        inside = counts[beyond == 0].sum()
        return float((counts * beyond**2).sum() + inside * ((high - low) / LEVELS) ** 2 / 12)

    shares = np.linspace(1, 1 / STEPS, STEPS)
    for _ in range(2):
        for upper in (high >= -low, high < -low):
            if upper:
                high = min((high * share for share in shares), key=lambda end: error(low, end))
            else:
                low = min((low * share for share in shares), key=lambda end: error(end, high))
    return float(low), float(high)


def quantized_activation(x: Tensor, ends: Range) -> Tensor:
    """Round a tensor to the 256 values of a range that holds zero."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = max((high - low) / LEVELS, 1e-12)
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, LEVELS)


def quantized_weight(weight: Tensor, axis: int) -> Tensor:
    """Round a weight to 255 values around zero for each channel of an axis."""
    largest = weight.detach().abs().amax([i for i in range(weight.dim()) if i != axis])
    scale = (largest / 127).clamp(min=1e-12).float()
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -127, 127)
