"""int8 that names the classes of float32: the few worst layers stay in float32 until it does."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from backbones.engines.formats import Conversion, Notes
from backbones.engines.quantization.layers import Layer, layers_of
from backbones.engines.quantization.ranges import Range
from backbones.engines.quantization.shares import KINDS, Share, margin_of, shares_of, statistics_of
from backbones.engines.verification import run_model
from backbones.errors import ConfigError

__all__ = ["Plan", "agreement_of", "tells_classes", "to_target"]

FEW = 32  # images for calibration
SAMPLE = 128  # images of which gradients are taken
MOST_WORK = 0.5  # of all multiplications that may stay in float32
ROUNDS = 6  # files that are made at most
FINE = 0.15  # of all multiplications, below which it does not matter how many more stay
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a quantizer is told.

    `kept` are the layers that stay in float32, `ranges` those of values, both by name; `images` are
    what other ranges are of.
    """

    images: Tensor
    ranges: Mapping[str, Range]
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Found:
    """How a file agrees with the model on images.

    `counted` is the share of images with the same class. `expected` is what images like them would
    have, whose errors and margins meet in all combinations: it tells thousandths where a count of
    some hundred images cannot. `variance` is the mean squared error of the margins.
    """

    counted: float
    expected: float
    variance: float

    @property
    def agreement(self) -> float:
        """The lesser of both."""
        return min(self.counted, self.expected)


def to_target(
    conversion: Conversion,
    program: GraphModule,
    make: Callable[[Plan], None],
    open: Callable[[], Callable[[Tensor], Any]],
    *,
    quantizes: Callable[[Layer], bool] = lambda layer: True,
    rounded: Collection[str] = (),
    kinds: int = KINDS,
) -> Notes:
    """Make an int8 file that names the classes of float32 for the share of images asked for.

    The layers that add most to the error for their work stay in float32: first as many as
    `shares_of` predicts, then more, as long as the file does not hold. At most half of the
    multiplications do; where that is not enough, the best file is left and a warning says so.
    Half of the images give ranges and the others judge, as those beyond a range are the ones that
    go wrong; the last file's ranges are of all images.

    Args:
        conversion: the images, the model in float32, and the `agreement` to hold (0: none).
        program: the recorded model, by whose names the quantizer knows layers.
        make: writes the file of a plan.
        open: opens the file that was written last.
        quantizes: whether the quantizer takes a layer at all.
        rounded: operators whose outputs the engine rounds as well as their operands.
        kinds: how many candidates there are for ranges; 1 for a quantizer that finds its own.

    Raises:
        ConfigError: there are no images.

    Returns:
        Notes on the file: agreement, and the layers left in float32.
    """
    images = conversion.calibration
    if images is None:
        raise ConfigError("int8 needs images to calibrate on (calibration=FOLDER or a tensor)")
    if len(images) < FEW:
        _logger.warning(
            "int8 is calibrated on %d images only; 100 and more, of all kinds that the model will"
            " see, are usual",
            len(images),
        )

    def batches(images: Tensor) -> list[Tensor]:
        return list(conversion.calibration_batches(images))

    layers = {name: layer for name, layer in layers_of(program).items() if quantizes(layer)}
    logits = _logits(conversion)
    if logits is None or not layers:
        make(Plan(images, statistics_of(program, layers, batches(images), 1).ranges()))
        return {}
    seen = judges = images
    if len(images) >= 2 * FEW:
        seen, judges, logits = images[::2], images[1::2], logits[1::2]
    part = statistics_of(program, layers, batches(seen), kinds)
    shares, best = shares_of(program, layers, batches(judges[:SAMPLE]), part, rounded)
    order, most = _worst_first(shares)
    ranges, sizes = part.ranges(best), []

    def tried(kept: int) -> _Found:
        sizes.append(kept)
        make(Plan(seen, ranges, _names(order[:kept])))
        runner = open()
        found = torch.cat([runner(batch) for batch in batches(judges)])
        return _compared(logits, found[: len(judges)])

    kept, found = _search(order, most, margin_of(logits), conversion.agreement, tried)
    if seen is not images:
        ranges = statistics_of(program, layers, batches(images), kinds).ranges(best)
    if seen is not images or sizes[-1] != kept:
        make(Plan(images, ranges, _names(order[:kept])))
    if found.agreement < conversion.agreement:
        _logger.warning(
            "int8 keeps the class of float32 for %.1f %% of images (%.1f %% of %d that were"
            " counted), not for the %.1f %% asked for, with %d of %d layers in float32; train the"
            " model on, or with rounded values, or ask for less",
            100 * found.expected,
            100 * found.counted,
            len(judges),
            100 * conversion.agreement,
            kept,
            len(order),
        )
    return {
        "agreement": found.counted,
        "expected_agreement": found.expected,
        "agreement_asked_for": conversion.agreement,
        "judged_by": len(judges),
        "layers": len(order),
        "layers_in_float32": [f"{one.layer.place} ({one.layer.operator})" for one in order[:kept]],
        "work_in_float32": _work(order[:kept]) / _work(order),
    }


def _search(
    order: list[Share],
    most: int,
    margins: Tensor,
    agreement: float,
    tried: Callable[[int], _Found],
) -> tuple[int, _Found]:
    """Return how many of the worst layers to keep, `most` at most, and what the file then does.

    `tried` makes the file that keeps so many, and compares it.
    """
    allowed = _variance_for(margins, agreement)
    kept = _enough(order, allowed, most)
    found: dict[int, _Found] = {}
    fewest: int | None = None  # of those that hold
    while len(found) < ROUNDS:
        last = found[kept] = tried(kept)
        if last.agreement >= agreement:
            fewest = kept
        if fewest is not None:  # which may be far more than it takes
            failing = [one for one in found if one < fewest]
            halfway = _halfway(order, max(failing), fewest) if failing else None
            if halfway is None:
                break
            kept = halfway
        elif kept == most:
            break
        else:  # the file may be off by more than was predicted, so that less is allowed
            scale = max(1.0, last.variance / _left(order, kept))
            further = kept + max(1, (most - kept) // 8)
            kept = max(further, _enough(order, allowed / scale, most))
    best = max(found, key=lambda n: (found[n].agreement, -n)) if fewest is None else fewest
    return best, found[best]


def _halfway(order: list[Share], low: int, high: int) -> int | None:
    """Return how many layers to keep for work halfway between; None if that is little."""
    done = [_work(order[:kept]) for kept in range(low, high + 1)]
    if done[-1] - done[0] <= FINE * _work(order) or len(done) < 3:
        return None
    return low + min(range(1, high - low), key=lambda i: abs(2 * done[i] - done[0] - done[-1]))


def _logits(conversion: Conversion) -> Tensor | None:
    """Return the model's logits (N, classes); None where nothing is to hold, or there are none."""
    if not conversion.agreement or conversion.outputs != ("logits",):
        return None
    assert conversion.calibration is not None
    logits: Tensor = run_model(conversion.model, conversion.calibration)
    return logits if tells_classes(logits) else None


def tells_classes(output: Any) -> bool:
    """Whether an output is of logits (N, classes), more than one."""
    return isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1


def _names(shares: list[Share]) -> frozenset[str]:
    return frozenset(one.layer.name for one in shares)


def _worst_first(shares: list[Share]) -> tuple[list[Share], int]:
    """Order layers by what they add to the error for their work; say how many may be kept.

    A small layer costs some time too where it stays in float32 alone. Those that would go beyond
    what may stay in float32 come last.
    """
    work = _work(shares)
    left, fit, others = MOST_WORK * work, [], []
    for one in sorted(shares, key=lambda one: one.variance / (one.work + work / 100), reverse=True):
        if one.work <= left:
            left -= one.work
            fit.append(one)
        else:
            others.append(one)
    return fit + others, len(fit)


def _work(shares: list[Share]) -> float:
    return sum(one.work for one in shares)


def _left(order: list[Share], kept: int) -> float:
    """Return the predicted variance of the layers that are not kept."""
    return max(sum(one.variance for one in order[kept:]), 1e-30)


def _enough(order: list[Share], variance: float, most: int) -> int:
    """Return how many layers to keep so that no more variance is left; at most so many."""
    return next((kept for kept in range(most) if _left(order, kept) <= variance), most)


def _variance_for(margins: Tensor, agreement: float) -> float:
    """Return the variance of normal errors at which a share of images is to keep its class."""
    low, high = -30.0, 30.0  # of the logarithm
    for _ in range(60):
        middle = (low + high) / 2
        kept = torch.special.ndtr(margins.double() / 10 ** (middle / 2)).mean()
        low, high = (middle, high) if kept >= agreement else (low, middle)
    return 10**low


def agreement_of(logits: Tensor, found: Tensor) -> float:
    """Return the share of images (0 to 1) that keep the class of `logits` (N, classes) in `found`:
    the share counted, or the share expected of images like them, whichever is less."""
    return _compared(logits, found).agreement


def _compared(logits: Tensor, found: Tensor) -> _Found:
    """Compare logits (N, classes) with those of a file."""
    margins = margin_of(logits).double()
    errors = margin_of(found, logits.topk(2, dim=-1).indices).double() - margins
    # An error of either sign is as likely, and one of both turns the class.
    turned = (errors.abs()[:, None] > margins).double().mean() / 2
    return _Found(
        counted=float((logits.argmax(1) == found.argmax(1)).double().mean()),
        expected=1 - float(turned),
        variance=float(errors.square().mean()),
    )
