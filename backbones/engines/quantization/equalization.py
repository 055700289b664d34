"""Exact scales between neighboring layers, after which 256 values tell more of what a layer reads.

One range holds all channels of a value, so a channel far larger than the others leaves these a few
of its 256 values. Where something makes the channel that has numbers for it alone (rows of a
convolution or linear layer, a norm, a layer scale), they are divided by a power of two, and the
columns of the layers that read the channel multiplied by it: to the bit the same function. A norm
whose weights went into the next layer when the model was re-parameterized gets weights again.
The scales weigh the largest activation against the largest weight of a channel, as SmoothQuant does
(Xiao et al., 2023, equation 4); that of a convolution's rows by its columns is cross-layer
equalization (Nagel et al., 2019, section 4.1).
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from backbones.engines.formats import Conversion, traced
from backbones.engines.preparation import Preprocessed
from backbones.engines.quantization.channels import Junction, channel_axis, junctions
from backbones.engines.quantization.layers import Layer, visit_all
from backbones.engines.quantization.ranges import quantized_activation, quantized_weight
from backbones.engines.verification import as_list, run_model
from backbones.errors import EquivalenceError

__all__ = ["equalize", "equalized"]

BALANCES = (0.5, 0.75, 1.0)  # of activations (1) against weights (0)
MOST_DOUBLINGS = 12
IMAGES = 128  # that scales are found on
TOLERANCE = 1e-4  # of the largest output; sums of the same products may be in another order


def equalized(conversion: Conversion) -> Conversion:
    """Return a conversion of a copy of the model whose values fit one range better.

    Raises:
        EquivalenceError: the copy computes something else.
    """
    assert conversion.calibration is not None
    alone = conversion.parts()[1] if conversion.raw else conversion
    batches = list(alone.calibration_batches(conversion.calibration[:IMAGES]))
    whole = copy.deepcopy(conversion.model)
    equalize(whole.model if isinstance(whole, Preprocessed) else whole, batches)
    return dataclasses.replace(conversion, model=whole)


def equalize(model: nn.Module, batches: Sequence[Tensor], *, norms: bool = True) -> None:
    """Scale channels of a model in eval mode, in place, so that values fit one range better.

    Half of the batches tell the largest values of channels, the others whether a layer errs less.

    Args:
        batches: normalized images (B, C, H, W), in batches of one size.
        norms: also give weights to norms that have none, by which the state gets further entries.

    Raises:
        ExportError: the model cannot be recorded.
        EquivalenceError: the model then computes something else.
    """
    seen, judges = (batches[::2], batches[1::2]) if len(batches) > 1 else (batches, batches)
    program = traced(Conversion(model, batches[0], dynamic=())).module()
    found = {one.value: one for one in junctions(program, model if norms else None)}
    layers = {one.layer.name: one.layer for each in found.values() for one in each.readers}
    ends = _ends(program, layers, seen)
    weights = dict(program.named_parameters()) | dict(program.named_buffers())
    options = {
        value: _options(one, *ends[value], weights) for value, one in found.items() if value in ends
    }
    best = _best(program, layers, judges, options, ends)
    expected = as_list(run_model(model, batches[0]))
    with torch.no_grad():
        for value, scales in best.items():
            _apply(found[value], scales, model)
    for before, after in zip(expected, as_list(run_model(model, batches[0]))):
        if (before - after).abs().max() > TOLERANCE * before.abs().max():
            raise EquivalenceError("scaling channels for int8 changed what the model computes")


def _apply(junction: Junction, scales: Tensor, model: nn.Module) -> None:
    """Divide what makes a value's channels by scales (C,), and multiply what reads them."""
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    parts = scales.split([piece.channels for piece in junction.pieces])
    for piece, part in zip(junction.pieces, parts):
        for name, axis in piece.numbers:
            if name not in weights:
                norm: Any = model.get_submodule(name.rpartition(".")[0])
                norm.weight = nn.Parameter(1 / part)
                continue
            numbers = weights[name]
            shape = [-1 if i == axis else 1 for i in range(numbers.dim())]
            numbers.div_(part.view(shape).to(numbers))
    for reader in junction.readers:
        weight = weights[reader.weight]
        weight.copy_(_columns_scaled(weight, scales, reader.groups))


def _columns_scaled(weight: Tensor, scales: Tensor, groups: int) -> Tensor:
    """Return a weight (O, I / groups, ...) for inputs that were divided by scales (I,)."""
    rows, columns, *taps = weight.shape
    grouped = weight.view(groups, rows // groups, columns, *taps)
    factors = scales.view(groups, 1, columns, *[1] * len(taps)).to(weight)
    return (grouped * factors).view_as(weight)


def _options(junction: Junction, low: Tensor, high: Tensor, weights: dict[str, Any]) -> Tensor:
    """Return scales to choose from (options, C), the first of which changes nothing."""
    largest = torch.maximum(-low, high)
    columns = torch.stack(
        [_largest_columns(weights[one.weight], one.groups) for one in junction.readers]
    ).amax(0)
    free, alive = junction.free, (largest > 0) & (columns > 0)
    # Channels that stay as they are set the measure of the others.
    measure = alive if bool((free & alive).eq(alive).all()) else alive & ~free
    found = [torch.ones_like(largest)]
    for balance in BALANCES:
        wanted = balance * largest.log2() - (1 - balance) * columns.log2()
        doublings = (wanted - wanted[measure].mean()).round()
        doublings = doublings.clamp(-MOST_DOUBLINGS, MOST_DOUBLINGS)
        found.append(torch.where(free & alive, 2.0**doublings, 1.0))
    return torch.stack(found)


def _largest_columns(weight: Tensor, groups: int) -> Tensor:
    """Return the largest magnitude of a weight (O, I / groups, ...) for each input channel (I,)."""
    rows, columns, *_ = weight.shape
    grouped = weight.detach().abs().reshape(groups, rows // groups, columns, -1)
    return grouped.amax((1, 3)).flatten()


def _channels(x: Tensor, layer: Layer) -> Tensor:
    """Return what a layer reads as (..., C)."""
    return x.movedim(channel_axis(layer.operator, x.dim()), -1)


def _ends(
    program: GraphModule, layers: dict[str, Layer], batches: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the least and the largest of each channel of values, and zero (C,)."""
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(layer: Layer, _: Any, operands: list[Any], __: Any, ___: Tensor) -> None:
        name = layer.activations[0]
        low, high = _channels(operands[0], layer).flatten(0, -2).aminmax(dim=0)
        before = ends.get(name, (torch.zeros_like(low), torch.zeros_like(high)))
        ends[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    visit_all(program, layers, batches, visit)
    return ends


def _best(
    program: GraphModule,
    layers: dict[str, Layer],
    batches: Sequence[Tensor],
    options: dict[str, Tensor],
    ends: dict[str, tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """Return by value the scales with which its readers err least, where these change something."""
    errors: dict[str, Tensor] = {}

    def visit(
        layer: Layer, operator: Any, operands: list[Any], keywords: dict[str, Any], output: Tensor
    ) -> None:
        name = layer.activations[0]
        found = []
        for scales in options.get(name, ()):
            low, high = (end / scales for end in ends[name])
            x = operands[0] / _as_operand(scales, operands[0], layer)
            x = quantized_activation(x, (float(low.min()), float(high.max())))
            groups = len(scales) // operands[1].shape[1]
            weight = quantized_weight(_columns_scaled(operands[1], scales, groups), 0)
            rounded = operator(x, weight, *operands[2:], **keywords)
            found.append((rounded - output).double().square().mean())
        if found:
            errors[name] = errors.get(name, 0) + torch.stack(found)

    visit_all(program, layers, batches, visit)
    chosen = {name: int(found.argmin()) for name, found in errors.items()}
    return {name: options[name][option] for name, option in chosen.items() if option}


def _as_operand(scales: Tensor, x: Tensor, layer: Layer) -> Tensor:
    """Return scales (C,) in the shape in which they meet what a layer reads."""
    axis = channel_axis(layer.operator, x.dim())
    return scales.view([-1 if i == axis else 1 for i in range(x.dim())])
