"""Running a model and a file on the same inputs, and how far their outputs are apart."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import ExportError

__all__ = ["TOLERANCE", "Agreement", "Check", "as_list", "compare", "run_model", "verify_on_inputs"]

# Largest difference over the output's largest magnitude. Half precision keeps three digits
# (fp16) or two (bf16) of every step. What 256 levels cost depends on the weights, and they hold for
# images like those of calibration only: int8 is compared on these, and its report tells how far it
# is; only what has lost the model altogether is refused.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1, "int8": 1.0}
PART = 32  # images that are compared at a time


@dataclass(frozen=True)
class Agreement:
    """Differences of two outputs (N, ...).

    `max_error` and `mean_error` are absolute; `relative_error` is the largest difference over the
    reference's largest magnitude; `top1_agreement` is the share of rows (0 to 1) whose highest
    logit is the same; `worst` is the index of the largest difference. Of several outputs (feature
    maps of all stages) the one with the largest relative error counts; `output` is its number.
    Where classes of the images are known, `top1` is the share that the output gets right, and
    `reference_top1` the share that the reference does.
    """

    count: int
    max_error: float
    mean_error: float
    relative_error: float
    top1_agreement: float
    worst: tuple[int, ...]
    output: int = 0
    top1: float | None = None
    reference_top1: float | None = None

    @property
    def in_words(self) -> str:
        """Shares of classes, as reports show them."""
        same = f"same top-1 for {self.top1_agreement:.1%}"
        if self.top1 is None:
            return same
        return f"{same}, {self.top1:.1%} right (model: {self.reference_top1:.1%})"


@dataclass(frozen=True)
class Check:
    """One comparison of an exported file with the model.

    `shape` is the input's, None for sizes that differ from image to image; `real` tells whether it
    held the user's images instead of random ones.
    """

    shape: tuple[int | None, ...]
    agreement: Agreement
    real: bool = False


def as_list(result: Any) -> list[Tensor]:
    """Return what a model gave, a tensor or a list of them, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def compare(
    reference: Tensor | Sequence[Tensor],
    output: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
) -> Agreement:
    """Compare the outputs of the same inputs, in float64; `labels` are the classes (N,) of them.

    Raises:
        ExportError: another number of outputs, other shapes, or values that are not finite.
    """
    expected, found = as_list(reference), as_list(output)
    if len(expected) != len(found):
        raise ExportError(f"there are {len(expected)} outputs and {len(found)}")
    several = [_compare(a, b, i, labels) for i, (a, b) in enumerate(zip(expected, found))]
    return max(several, key=lambda one: one.relative_error)


def _compare(reference: Tensor, output: Tensor, number: int, labels: Tensor | None) -> Agreement:
    if reference.shape != output.shape:
        raise ExportError(
            f"the outputs have shapes {tuple(reference.shape)} and {tuple(output.shape)}"
        )
    for name, values in (("model's", reference), ("exported file's", output)):
        if not torch.isfinite(values).all():
            raise ExportError(f"the {name} output has values that are not finite")
    a, b = reference.detach().double().cpu(), output.detach().double().cpu()
    difference = (a - b).abs()
    worst = torch.unravel_index(difference.argmax(), difference.shape)
    largest = float(difference.max())
    scale = float(a.abs().max())
    classes = a.argmax(dim=1), b.argmax(dim=1)
    known = labels if a.dim() == 2 else None
    right = [None if known is None else _share(one.eq(known)) for one in classes]
    return Agreement(
        count=len(a),
        max_error=largest,
        mean_error=float(difference.mean()),
        relative_error=largest / scale if scale else largest,
        top1_agreement=_share(classes[0].eq(classes[1])),
        worst=tuple(int(i) for i in worst),
        output=number,
        reference_top1=right[0],
        top1=right[1],
    )


def _share(true: Tensor) -> float:
    return float(true.double().mean())


def verify_on_inputs(
    model: nn.Module,
    runner: Callable[[Tensor], Any],
    inputs: Iterable[Tensor],
    precision: str,
    path: Path,
    real: bool = False,
    labels: Tensor | None = None,
) -> Check:
    """Compare the runner of a file with the model, the reference in float32, on inputs (B, ...).

    They may differ as `TOLERANCE` allows. `path` is where the file shall go, for the message;
    `real`: the inputs are real images, whose classes `labels` (N,) are, where known.
    """
    given, one_by_one = [], []
    for x in inputs:  # of photographs not all at once, as there are large ones
        given.append(x.shape)
        one_by_one.append((run_model(model, x), runner(x)))
    expected, found = (_joined(parts) for parts in zip(*one_by_one))
    images, *sizes = zip(*given)
    shape = (sum(images), *(same[0] if len({*same}) == 1 else None for same in sizes))
    try:
        agreement = compare(expected, found, labels)
    except ExportError as error:
        raise ExportError(f"{path}: input {shape}: {error}; no file was written") from None
    tolerance = TOLERANCE[precision]
    if agreement.relative_error > tolerance:
        at, number = agreement.worst, agreement.output
        is_, should = as_list(found)[number][at], as_list(expected)[number][at]
        raise ExportError(
            f"{path}: the exported file does not compute what the model computes: input {shape},"
            f" output {at} is {float(is_):.6g} instead of {float(should):.6g}"
            f" (relative error {agreement.relative_error:.1e}, allowed {tolerance:.0e};"
            f" same top-1 for {agreement.top1_agreement:.0%}); no file was written"
        )
    return Check(shape, agreement, real)


def run_model(model: nn.Module, x: Tensor) -> Any:
    """Run the model without gradients, a few images at a time."""
    with torch.no_grad():
        return _joined([model(part) for part in x.split(PART)])


def _joined(parts: list[Any] | tuple[Any, ...]) -> Any:
    """Return outputs for several inputs as those for all of them."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [torch.cat(outputs) for outputs in zip(*parts)]
