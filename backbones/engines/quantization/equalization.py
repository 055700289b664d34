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
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from backbones.engines.formats import Conversion, traced
from backbones.engines.preparation import Preprocessed
from backbones.engines.quantization.layers import Layer, layers_of, operator_of, visit_all
from backbones.engines.quantization.ranges import quantized_activation, quantized_weight
from backbones.engines.verification import as_list, run_model
from backbones.errors import EquivalenceError

__all__ = ["equalize", "equalized"]

BALANCES = (0.5, 0.75, 1.0)  # of activations (1) against weights (0)
MOST_DOUBLINGS = 12
IMAGES = 128  # that scales are found on
TOLERANCE = 1e-4  # of the largest output; sums of the same products may be in another order
# Their output has the channels of their first operand, and each scales with it.
_TRANSPARENT = (
    "relu relu_ leaky_relu dropout clone contiguous alias max_pool2d avg_pool2d"
    " adaptive_avg_pool2d constant_pad_nd pad"
    " upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"
).split()
_RESHAPES = ("view", "reshape", "flatten", "_unsafe_view", "unflatten")
_NORMS = ("layer_norm", "batch_norm", "group_norm")
_READERS = ("conv1d", "conv2d", "conv3d", "linear")
_Numbers = tuple[str, int]  # a parameter's name, which a norm may lack, and its axis of channels


@dataclass(frozen=True)
class _Piece:
    """So many channels of a value, and the `numbers` by which they scale; none: they cannot."""

    channels: int
    numbers: tuple[_Numbers, ...] = ()


@dataclass(frozen=True)
class _Junction:
    """A value, what makes its channels, and the layers that read it, all of them."""

    value: str
    pieces: tuple[_Piece, ...]
    readers: tuple[tuple[Layer, str, int], ...]  # with the name of the weight, and groups

    @property
    def free(self) -> Tensor:
        """Which channels can be scaled (C,)."""
        parts = [torch.full((one.channels,), bool(one.numbers)) for one in self.pieces]
        return torch.cat(parts)


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
    junctions = {one.value: one for one in _junctions(program, model, norms)}
    layers = {layer.name: layer for one in junctions.values() for layer, *_ in one.readers}
    ends = _ends(program, layers, seen)
    weights = dict(program.named_parameters()) | dict(program.named_buffers())
    options = {
        value: _options(one, *ends[value], weights)
        for value, one in junctions.items()
        if value in ends
    }
    best = _best(program, layers, judges, options, ends)
    expected = as_list(run_model(model, batches[0]))
    with torch.no_grad():
        for value, scales in best.items():
            _apply(junctions[value], scales, model)
    for before, after in zip(expected, as_list(run_model(model, batches[0]))):
        if (before - after).abs().max() > TOLERANCE * before.abs().max():
            raise EquivalenceError("scaling channels for int8 changed what the model computes")


def _apply(junction: _Junction, scales: Tensor, model: nn.Module) -> None:
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
    for _, name, groups in junction.readers:
        weights[name].copy_(_columns_scaled(weights[name], scales, groups))


def _columns_scaled(weight: Tensor, scales: Tensor, groups: int) -> Tensor:
    """Return a weight (O, I / groups, ...) for inputs that were divided by scales (I,)."""
    rows, columns, *taps = weight.shape
    grouped = weight.view(groups, rows // groups, columns, *taps)
    factors = scales.view(groups, 1, columns, *[1] * len(taps)).to(weight)
    return (grouped * factors).view_as(weight)


def _options(junction: _Junction, low: Tensor, high: Tensor, weights: dict[str, Any]) -> Tensor:
    """Return scales to choose from (options, C), the first of which changes nothing."""
    largest = torch.maximum(-low, high)
    columns = torch.stack(
        [_largest_columns(weights[name], groups) for _, name, groups in junction.readers]
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
    return x if layer.operator == "linear" else x.movedim(1, -1)


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
    return scales if layer.operator == "linear" else scales.view(1, -1, *[1] * (x.dim() - 2))


def _junctions(program: GraphModule, model: nn.Module, norms: bool) -> Iterator[_Junction]:
    """Yield the values all of whose readers are layers, and some of whose channels scale."""
    layers = layers_of(program)
    found = _Numbered(program, model if norms else None)
    for node in program.graph.nodes:
        readers = [_reader(layers.get(one.name), node, found) for one in node.users]
        if not readers or None in readers:
            continue
        known = [one for one in readers if one is not None]
        axis = -1 if known[0][0].operator == "linear" else 1
        if len({one[0].operator == "linear" for one in known}) > 1:
            continue
        pieces = tuple(found.pieces(node, axis % node.meta["val"].dim()))
        if any(piece.numbers for piece in pieces):
            yield _Junction(node.name, pieces, tuple(known))


def _reader(layer: Layer | None, value: Node, found: "_Numbered") -> tuple[Layer, str, int] | None:
    """Return a layer whose first operand a value is, with its weight and groups; else None."""
    if layer is None or layer.operator not in _READERS or layer.activations != {0: value.name}:
        return None
    node = next(one for one in value.users if one.name == layer.name)
    weight = cast("Node", node.args[1])
    name = found.name_of(weight)
    if name is None:
        return None
    channels = value.meta["val"].shape[-1 if layer.operator == "linear" else 1]
    return layer, name, channels // weight.meta["val"].shape[1]


class _Numbered:
    """Finds the parameters by which the channels of a recorded value scale."""

    def __init__(self, program: GraphModule, model: nn.Module | None) -> None:
        tensors = [*program.named_parameters(remove_duplicate=False), *program.named_buffers()]
        places = Counter(tensor.data_ptr() for _, tensor in tensors)
        nodes = [node for node in program.graph.nodes if node.op == "get_attr"]
        uses = Counter(str(node.target) for node in nodes for _ in node.users)
        self.single = {
            name for name, tensor in tensors if places[tensor.data_ptr()] == 1 == uses[name]
        }
        norms = [_module_of(node) for node in program.graph.nodes if operator_of(node) in _NORMS]
        once = {path for path, count in Counter(norms).items() if path and count == 1}
        self.bare = {p for p in once if model is not None and _is_bare(model.get_submodule(p))}

    def name_of(self, node: Any) -> str | None:
        """Return the name of a parameter that is used here alone."""
        known = isinstance(node, Node) and node.op == "get_attr" and node.target in self.single
        return str(node.target) if known else None

    def pieces(self, node: Node, axis: int) -> list[_Piece]:
        """Return what makes the channels of a value, along an axis."""
        channels = node.meta["val"].shape[axis]
        fixed = [_Piece(channels)]
        operator, args = operator_of(node), cast("tuple[Any, ...]", node.args)
        if operator in _READERS:
            if axis != (node.meta["val"].dim() - 1 if operator == "linear" else 1):
                return fixed
            return self._made_by(channels, *args[1:3])
        if operator in _NORMS:
            first = 1 if operator == "batch_norm" else 2
            if axis != (node.meta["val"].dim() - 1 if operator == "layer_norm" else 1):
                return fixed
            if _module_of(node) in self.bare:
                return [_Piece(channels, ((f"{_module_of(node)}.weight", 0),))]
            return self._made_by(channels, *args[first : first + 2])
        if operator == "cat":
            return self._joined(node, axis) or fixed
        if operator in ("mul", "add"):
            return self._of_two(node, axis) or fixed
        source = args[0] if args and isinstance(args[0], Node) else None
        before = None if source is None else _axis_before(node, source, operator, axis)
        if source is None or before is None or len(source.users) != 1:
            return fixed
        if source.meta["val"].shape[before] != channels:  # padded along this axis
            return fixed
        return self.pieces(source, before)

    def _made_by(self, channels: int, weight: Any, bias: Any = None) -> list[_Piece]:
        """Return the channels that rows of a weight and a bias make."""
        names = [self.name_of(one) for one in (weight, bias) if one is not None]
        if weight is None or None in names or weight.meta["val"].shape[0] != channels:
            return [_Piece(channels)]
        return [_Piece(channels, tuple((str(name), 0) for name in names))]

    def _joined(self, node: Node, axis: int) -> list[_Piece] | None:
        """Return the channels of values one after the other."""
        parts, along, *_ = cast("Any", (*node.args, 0))
        if along % node.meta["val"].dim() != axis:
            return None
        pieces = []
        for part in parts:
            own = len(part.users) == 1 and parts.count(part) == 1
            channels = part.meta["val"].shape[axis]
            pieces += self.pieces(part, axis) if own else [_Piece(channels)]
        return pieces

    def _of_two(self, node: Node, axis: int) -> list[_Piece] | None:
        """Return the channels of a product, which one factor scales, or of a sum."""
        sides = [self._side(one, node, axis) for one in node.args[:2]]
        if operator_of(node) == "mul":
            return next((side for side in sides if side and any(p.numbers for p in side)), None)
        first, second = sides
        if not first or not second or len(first) != len(second):
            return None
        summed = []
        for one, other in zip(first, second):
            if one.channels != other.channels:
                return None
            both = bool(one.numbers and other.numbers)
            summed.append(_Piece(one.channels, one.numbers + other.numbers if both else ()))
        return summed

    def _side(self, side: Any, node: Node, axis: int) -> list[_Piece] | None:
        """Return the channels of one operand of a product or sum; None where it has none."""
        if not isinstance(side, Node) or len(side.users) != 1:
            return None
        whole, own = node.meta["val"].shape, side.meta["val"].shape
        at = axis - (len(whole) - len(own))
        if at < 0 or own[at] != whole[axis]:
            return None
        constant = side
        while operator_of(constant) in (*_RESHAPES, "unsqueeze") and len(constant.users) == 1:
            constant = cast("Node", constant.args[0])
        if (name := self.name_of(constant)) is not None:
            shape = constant.meta["val"].shape
            if math.prod(shape) != whole[axis]:
                return None
            return [_Piece(whole[axis], ((name, max(range(len(shape)), key=lambda i: shape[i])),))]
        return self.pieces(side, at)


def _module_of(node: Node) -> str:
    """Return the path of the module in which a node was recorded."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _is_bare(module: nn.Module) -> bool:
    """Return whether a module is a norm over channels that has lost its weight and bias."""
    is_norm = isinstance(module, nn.GroupNorm) or (
        isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
    )
    return is_norm and module.weight is None and module.bias is None


def _axis_before(node: Node, source: Node, operator: str, axis: int) -> int | None:
    """Return the axis of an operation's operand whose channels an axis of its output has."""
    if operator in _TRANSPARENT:
        filled = node.args[-1] if operator in ("constant_pad_nd", "pad") else 0
        return axis if filled in (0, "constant") or isinstance(filled, list) else None
    if operator == "permute":
        order: Any = node.args[1]
        return int(order[axis]) % len(order)
    if operator == "transpose":
        first, second = (
            one % node.meta["val"].dim() for one in cast("tuple[int, ...]", node.args[1:3])
        )
        return {first: second, second: first}.get(axis, axis)
    if operator == "mean" and len(node.args) > 1:
        axes: Any = node.args[1]
        count = source.meta["val"].dim()
        gone = sorted(one % count for one in axes)
        kept = count == node.meta["val"].dim()
        before = axis if kept else [i for i in range(count) if i not in gone][axis]
        return None if before in gone else before
    if operator in _RESHAPES:
        whole, own = node.meta["val"].shape, source.meta["val"].shape
        ahead = math.prod(whole[:axis])
        found = [i for i in range(len(own)) if math.prod(own[:i]) == ahead]
        return next((i for i in found if own[i] == whole[axis]), None)
    return None
