"""What each layer adds to the error of int8, found in one pass over images without any file.

An image keeps its class while the error of the difference of its two highest logits, the margin,
is smaller than the margin. To first order a layer adds to it the product of the error that int8
makes in its output with the margin's gradient there.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from backbones.engines.quantization.layers import Layer, visit_all, walk
from backbones.engines.quantization.ranges import (
    Range,
    Statistics,
    quantized_activation,
    quantized_weight,
)

__all__ = ["KINDS", "Share", "margin_of", "shares_of", "statistics_of"]

KINDS = 3  # of candidates for a range


@dataclass(frozen=True)
class Share:
    """What int8 costs in one layer, and gains.

    `variance` is the mean over images of the squared error that it adds to the margin; `work` is
    the number of multiplications for an image.
    """

    layer: Layer
    variance: float
    work: float


def margin_of(logits: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return how far the highest logit is above the second (N,).

    With `classes` (N, 2), how far the first of these is above the second.
    """
    if classes is None:
        classes = logits.topk(2, dim=-1).indices
    first, second = logits.gather(-1, classes).unbind(-1)
    return first - second


def statistics_of(
    module: GraphModule, layers: Mapping[str, Layer], batches: Sequence[Tensor], kinds: int = KINDS
) -> Statistics:
    """Return how the operands and outputs of layers are distributed, for so many candidates."""
    statistics = Statistics()
    for add in (statistics.add_ends, statistics.add_counts)[: 1 if kinds == 1 else 2]:

        def visit(layer: Layer, _: Any, operands: list[Any], __: Any, output: Tensor) -> None:
            for position, name in layer.activations.items():
                add(name, operands[position])  # noqa: B023
            add(layer.name, output)  # noqa: B023

        visit_all(module, layers, batches, visit)
    return statistics


def shares_of(
    module: GraphModule,
    layers: Mapping[str, Layer],
    batches: Sequence[Tensor],
    statistics: Statistics,
    rounded: Collection[str] = (),
) -> tuple[list[Share], dict[str, int]]:
    """Return the share of each layer, in the order of their computation, and kinds of ranges.

    Of the candidates for the range of a value that one counts that does least harm on these
    images, which should be others than those of the statistics. `rounded` are the
    operators whose outputs the engine rounds as well as their operands.
    """
    candidates = {name: statistics.candidates(name) for name in statistics.ends}
    kinds = KINDS if statistics.counts else 1
    added: dict[tuple[str, str], list[Tensor]] = {}
    work: dict[str, float] = {}
    seen: list[tuple[str, dict[str, Tensor], Tensor]] = []

    def visit(
        layer: Layer, operator: Any, operands: list[Any], keywords: dict[str, Any], output: Tensor
    ) -> None:
        errors = {}
        with torch.no_grad():
            made = [
                operator(*_rounded(layer, operands, candidates, kind), **keywords)
                for kind in range(kinds)
            ]
            errors["operands"] = torch.stack(made) - output
            if layer.operator in rounded:
                ends = candidates[layer.name]
                errors["output"] = torch.stack([quantized_activation(output, e) for e in ends])
                errors["output"] -= output
        work[layer.name] = _work(layer, operands, output) / len(output)
        seen.append((layer.name, errors, output))

    with torch.enable_grad():  # whatever the caller is in
        for logits in walk(module, layers, _with_gradients(batches), visit):
            gradients = torch.autograd.grad(
                margin_of(logits).sum(), [output for *_, output in seen]
            )
            for (name, errors, _), gradient in zip(seen, gradients):
                for side, error in errors.items():
                    products = (error * gradient).flatten(2).sum(2)  # kinds, images
                    added.setdefault((name, side), []).append(products)
            seen.clear()
    variances = {
        key: torch.cat(found, dim=1).double().square().mean(1) for key, found in added.items()
    }
    # A value may be the operand of several layers, and the output of one.
    harm: dict[str, Tensor] = {}
    for (name, side), variance in variances.items():
        values = layers[name].activations.values() if side == "operands" else [name]
        for value in values:
            harm[value] = harm.get(value, 0) + variance
    best = {value: int(found.argmin()) for value, found in harm.items()}
    shares = []
    for name, layer in layers.items():
        operands = max((best[value] for value in layer.activations.values()), default=0)
        variance = variances[name, "operands"][operands]
        if (name, "output") in variances:
            variance = variance + variances[name, "output"][best[name]]
        shares.append(Share(layer, float(variance), work[name]))
    return shares, best


def _with_gradients(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch.clone().requires_grad_(True)


def _rounded(
    layer: Layer, operands: list[Any], candidates: Mapping[str, Sequence[Range]], kind: int
) -> list[Any]:
    """Return a layer's operands as int8 has them, with candidates of one kind for ranges."""
    result = list(operands)
    for position, name in layer.activations.items():
        result[position] = quantized_activation(result[position], candidates[name][kind])
    for position in layer.weights:
        axis = result[position].dim() - 1 if layer.is_product else 0
        result[position] = quantized_weight(result[position], axis)
    return result


def _work(layer: Layer, operands: list[Any], output: Tensor) -> float:
    """Return the number of multiplications of a layer."""
    terms = operands[0].shape[-1] if layer.is_product else operands[1][0].numel()
    return float(output.numel() * terms)
