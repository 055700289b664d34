"""The numbers of a model by which a channel of a value scales: rows, norms and layer scales."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from backbones.engines.quantization.layers import Layer, layers_of, operator_of

__all__ = ["Junction", "Numbers", "Piece", "Reader", "channel_axis", "junctions"]

# Their output has the channels of their first operand, and each scales with it.
_TRANSPARENT = (
    "relu relu_ leaky_relu dropout clone contiguous alias max_pool2d avg_pool2d"
    " adaptive_avg_pool2d constant_pad_nd pad"
    " upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"
).split()
_RESHAPES = ("view", "reshape", "flatten", "_unsafe_view", "unflatten")
_NORMS = ("layer_norm", "batch_norm", "group_norm")
_READERS = ("conv1d", "conv2d", "conv3d", "linear")
Numbers = tuple[str, int]
"""A parameter's name, which a norm may lack, and its axis of channels."""


def channel_axis(operator: str, dims: int) -> int:
    """Return the axis of channels in what a layer or norm reads and gives, of so many axes."""
    return dims - 1 if operator in ("linear", "layer_norm") else 1


@dataclass(frozen=True)
class Piece:
    """So many channels of a value, and the `numbers` by which they scale; none: they cannot."""

    channels: int
    numbers: tuple[Numbers, ...] = ()


@dataclass(frozen=True)
class Reader:
    """A layer that reads a value: its weight's name, and groups of channels."""

    layer: Layer
    weight: str
    groups: int


@dataclass(frozen=True)
class Junction:
    """A value, what makes its channels, and the layers that read it, all of them."""

    value: str
    pieces: tuple[Piece, ...]
    readers: tuple[Reader, ...]

    @property
    def free(self) -> Tensor:
        """Which channels can be scaled (C,)."""
        parts = [torch.full((one.channels,), bool(one.numbers)) for one in self.pieces]
        return torch.cat(parts)


def junctions(program: GraphModule, model: nn.Module | None = None) -> Iterator[Junction]:
    """Yield the values all of whose readers are layers, and some of whose channels scale.

    Args:
        program: the model as it was recorded.
        model: what was recorded; with it norms without weights scale too.
    """
    layers = layers_of(program)
    found = _Makers(program, model)
    for node in program.graph.nodes:
        readers = [_reader(layers.get(one.name), node, found) for one in node.users]
        known = [one for one in readers if one is not None]
        dims = node.meta["val"].dim() if known else 0
        axes = {channel_axis(one.layer.operator, dims) for one in known}
        if len(known) < len(readers) or len(axes) != 1:
            continue
        pieces = tuple(found.pieces(node, *axes))
        if any(piece.numbers for piece in pieces):
            yield Junction(node.name, pieces, tuple(known))


def _reader(layer: Layer | None, value: Node, found: "_Makers") -> Reader | None:
    """Return a layer whose first operand a value is; else None."""
    if layer is None or layer.operator not in _READERS or layer.activations != {0: value.name}:
        return None
    node = next(one for one in value.users if one.name == layer.name)
    weight = cast("Node", node.args[1])
    name = found.name_of(weight)
    if name is None:
        return None
    given = value.meta["val"]
    channels = given.shape[channel_axis(layer.operator, given.dim())]
    return Reader(layer, name, channels // weight.meta["val"].shape[1])


class _Makers:
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

    def pieces(self, node: Node, axis: int) -> list[Piece]:
        """Return what makes the channels of a value, along an axis."""
        channels = node.meta["val"].shape[axis]
        fixed = [Piece(channels)]
        operator, args = operator_of(node), cast("tuple[Any, ...]", node.args)
        if operator in (*_READERS, *_NORMS):
            if axis != channel_axis(operator, node.meta["val"].dim()):
                return fixed
            if _module_of(node) in self.bare:
                return [Piece(channels, ((f"{_module_of(node)}.weight", 0),))]
            first = 2 if operator in ("layer_norm", "group_norm") else 1
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

    def _made_by(self, channels: int, weight: Any, bias: Any = None) -> list[Piece]:
        """Return the channels that rows of a weight and a bias make."""
        names = [self.name_of(one) for one in (weight, bias) if one is not None]
        if weight is None or None in names or weight.meta["val"].shape[0] != channels:
            return [Piece(channels)]
        return [Piece(channels, tuple((str(name), 0) for name in names))]

    def _joined(self, node: Node, axis: int) -> list[Piece] | None:
        """Return the channels of values one after the other."""
        parts, along, *_ = cast("Any", (*node.args, 0))
        if along % node.meta["val"].dim() != axis:
            return None
        pieces = []
        for part in parts:
            own = len(part.users) == 1 and parts.count(part) == 1
            channels = part.meta["val"].shape[axis]
            pieces += self.pieces(part, axis) if own else [Piece(channels)]
        return pieces

    def _of_two(self, node: Node, axis: int) -> list[Piece] | None:
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
            summed.append(Piece(one.channels, one.numbers + other.numbers if both else ()))
        return summed

    def _side(self, side: Any, node: Node, axis: int) -> list[Piece] | None:
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
            return [Piece(whole[axis], ((name, max(range(len(shape)), key=lambda i: shape[i])),))]
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
