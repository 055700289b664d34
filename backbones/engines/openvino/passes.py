"""The same computation in operations that OpenVINO has faster kernels for.

The passes are for an ``openvino.Model`` whose shapes are known, which they change in place, so they
run when a file is opened: with a free batch size OpenVINO would carry the permutations out, and a
file that held them be slower.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from backbones.engines.timing import least
from backbones.optional import optional_import

__all__ = [
    "milliseconds",
    "norms_on_rows",
    "scales_into_weights",
    "single_outputs_by_lanes",
    "widen_depthwise",
]

# A convolution puts weights that are no constants in order at every call. That is cheaper than to
# scale its map where it has this many positions for each channel of the result.
POSITIONS_PER_CHANNEL = 50

# A convolution to one channel uses one of the LANES of a vector. Below this many channels that
# costs less than a second convolution.
LANES = 16
LEAST_CHANNELS = 128

# oneDNN unrolls small depthwise kernels and loops over large ones. Just below the limit the
# unrolled code is too long for the processor's caches: here a kernel of 13x13 takes three to four
# times as long as one of 15x15. Where the limit lies depends on processor and version, so each
# shape is measured once where it runs.
NARROW = (9, 11, 13)
WIDE = 15
ROUNDS, TURNS = 10, 4  # calls of each kernel in a row, and how often that is done


def norms_on_rows(model: Any) -> int:
    """Divide maps by the root mean square of their channels with the channels at the end.

    OpenVINO has a kernel for that. Its layout of maps has the channels at the end already, so the
    permutations around the kernel are nothing. Returns the number of norms.
    """
    ops = optional_import("openvino.opset8", "openvino")
    count = 0
    for node in model.get_ordered_ops():
        found = _root_mean_square(node)
        if found is None:
            continue
        x, eps = found
        rows = ops.transpose(x, [0, 2, 3, 1])
        square = ops.reduce_mean(ops.power(rows, np.float32(2)), [-1], True)
        root = ops.sqrt(ops.add(square, np.float32(eps)))
        rows = ops.multiply(rows, ops.divide(np.float32(1), root))
        _replace(node, ops.transpose(rows, [0, 3, 1, 2]))
        count += 1
    return count


def scales_into_weights(model: Any) -> list[tuple[int, ...]]:
    """Scale the weights of 1x1 convolutions instead of the channels of their large maps.

    Returns the shapes (B, C, H, W) of the maps that are no longer scaled.
    """
    ops = optional_import("openvino.opset8", "openvino")
    spared = []
    for node in model.get_ordered_ops():
        if not _is_pointwise(node):
            continue
        scaled, weights = node.input_value(0), node.input_value(1)
        _, channels, height, width = shape = tuple(scaled.get_shape())
        only_use = len(scaled.get_target_inputs()) == 1
        if not only_use or scaled.get_node().get_type_name() != "Multiply":
            continue
        x, scale = scaled.get_node().input_values()
        # One scale for the whole batch: of several images each would need weights of its own.
        by_channel = tuple(scale.get_shape()) == (1, channels, 1, 1) and _constant_of(scale) is None
        if by_channel and height * width >= POSITIONS_PER_CHANNEL * weights.get_shape()[0]:
            weights = ops.multiply(weights, scale)
            _replace(node, ops.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1]))
            spared.append(shape)
    return spared


def single_outputs_by_lanes(model: Any) -> int:
    """Compute 1x1 convolutions to a single channel by depthwise ones, in all lanes of a vector.

    OpenVINO's layout of maps has the channels at the end, so that a row of W positions with C
    channels is one of W C / LANES positions with LANES channels. Its depthwise convolution by
    kernels of C / LANES, as far apart, leaves LANES sums for each position, and a 1x1 convolution
    adds them. Returns the number of convolutions.
    """
    ops = optional_import("openvino.opset8", "openvino")
    ones = np.ones((1, LANES, 1, 1), np.float32)
    count = 0
    for node in model.get_ordered_ops():
        weights = _constant_of(node.input_value(1)) if _is_pointwise(node) else None
        if weights is None or len(weights) != 1:
            continue
        batch, channels, height, width = node.input(0).get_shape()
        if channels < LEAST_CHANNELS or channels % LANES:
            continue
        taps = channels // LANES
        rows = ops.transpose(node.input_value(0), [0, 2, 3, 1])
        rows = ops.reshape(rows, [batch, height, width * taps, LANES], False)
        kernels = np.ascontiguousarray(weights.reshape(taps, LANES).T)
        sums = ops.group_convolution(
            ops.transpose(rows, [0, 3, 1, 2]),
            ops.constant(kernels.reshape(LANES, 1, 1, 1, taps)),
            [1, taps],
            [0, 0],
            [0, 0],
            [1, 1],
        )
        _replace(node, ops.convolution(sums, ops.constant(ones), [1, 1], [0, 0], [0, 0], [1, 1]))
        count += 1
    return count


def _root_mean_square(node: Any) -> tuple[Any, float] | None:
    """Match ``x * (1 / sqrt(mean(x ** 2) + eps))``, the mean over channels; return x and eps."""
    divide = _operand(node, "Multiply", 1)
    add = _operand(_operand(divide, "Divide", 1), "Sqrt", 0)
    power = _averaged(_operand(add, "Add", 0))
    if power is None or power.get_type_name() != "Power":
        return None
    x = node.input_value(0)
    one, two = _constant_of(divide.input_value(0)), _constant_of(power.input_value(1))
    eps = _constant_of(add.input_value(1))
    if one is None or two is None or eps is None or eps.size != 1:
        return None
    same = power.input_value(0) == x and (one == 1).all() and (two == 2).all()
    return (x, eps.item()) if same else None


def _operand(node: Any, kind: str, index: int) -> Any:
    """Return the node that gives an input of `node`; None where `node` is None or no `kind`."""
    if node is None or node.get_type_name() != kind:
        return None
    return node.input_value(index).get_node()


def _averaged(node: Any) -> Any:
    """Return the node whose map `node` averages over the channels; None where it does not."""
    if node is None or node.get_type_name() not in ("ReduceMean", "Convolution"):
        return None
    x, other = node.input_value(0), _constant_of(node.input_value(1))
    if other is None or len(x.get_shape()) != 4:
        return None
    if node.get_type_name() == "ReduceMean":
        over_channels = other.ravel().tolist() == [1] and node.get_attributes()["keep_dims"]
    else:
        channels = x.get_shape()[1]
        over_channels = (
            _is_pointwise(node)
            and other.shape == (1, channels, 1, 1)
            and np.allclose(other, 1 / channels)
        )
    return x.get_node() if over_channels else None


def _is_pointwise(node: Any) -> bool:
    """Whether `node` is a 1x1 convolution of every position."""
    if node.get_type_name() != "Convolution" or set(node.input_value(1).get_shape()[2:]) != {1}:
        return False
    found = node.get_attributes()
    return set(found["strides"]) == {1} and not any([*found["pads_begin"], *found["pads_end"]])


def widen_depthwise(model: Any, options: dict[str, Any]) -> list[tuple[int, ...]]:
    """Pad depthwise kernels with zeros where that is faster in a model compiled with `options`.

    Returns the (channels, height, width, kernel) that were widened.
    """
    found: dict[tuple[int, ...], list[tuple[Any, np.ndarray]]] = {}
    for node, weights in _narrow(model):
        _, channels, height, width = node.input(0).get_shape()
        found.setdefault((channels, height, width, weights.shape[-1]), []).append((node, weights))
    widened = []
    for shape, nodes in found.items():
        # By a tenth at least, as it is measured alone, with warm caches.
        narrow, wide = milliseconds(shape, (shape[-1], WIDE), options)
        if wide < 0.9 * narrow:
            for node, weights in nodes:
                _widen(node, weights)
            widened.append(shape)
    return widened


def _narrow(model: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield the depthwise convolutions with a narrow square kernel, and their weights."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupConvolution":
            continue
        weights = _constant_of(node.input_value(1))
        if weights is None or not node.input(0).get_partial_shape().is_static:
            continue
        *_, height, width = weights.shape
        wanted = {"strides": 1, "dilations": 1, "pads_begin": width // 2, "pads_end": width // 2}
        attributes = node.get_attributes()
        plain = all(set(attributes[name]) == {value} for name, value in wanted.items())
        depthwise = weights.shape[1:3] == (1, 1) and height == width
        if plain and depthwise and width in NARROW:
            yield node, weights


def _widen(node: Any, weights: np.ndarray) -> None:
    more = (WIDE - weights.shape[-1]) // 2
    wide = np.pad(weights, ((0, 0),) * 3 + ((more, more),) * 2)
    _replace(node, _convolution(node.input_value(0), wide))


def _convolution(x: Any, weights: np.ndarray) -> Any:
    """Return the node of a depthwise convolution that keeps the size."""
    ops = optional_import("openvino.opset8", "openvino")
    pads = [weights.shape[-1] // 2] * 2
    return ops.group_convolution(x, ops.constant(weights), [1, 1], pads, pads, [1, 1])


def milliseconds(
    shape: tuple[int, ...], kernels: tuple[int, ...], options: dict[str, Any]
) -> list[float]:
    """Return how long one convolution takes with each kernel, compiled alone, in turns."""
    calls = [_alone(shape, kernel, options) for kernel in kernels]
    x = np.random.default_rng(0).standard_normal((1, *shape[:3]), dtype=np.float32)
    turns = [[least(call, x, ROUNDS) for call in calls] for _ in range(TURNS)]
    return [min(times) for times in zip(*turns)]


def _alone(shape: tuple[int, ...], kernel: int, options: dict[str, Any]) -> Callable[[Any], Any]:
    """Return a callable of one convolution."""
    ov = optional_import("openvino", "openvino")
    ops = optional_import("openvino.opset8", "openvino")
    channels, height, width, _ = shape
    x = ops.parameter([1, channels, height, width], np.float32)
    weights = np.random.default_rng(0).standard_normal(
        (channels, 1, 1, kernel, kernel), dtype=np.float32
    )
    model = ov.Model([_convolution(x, weights)], [x])
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True, share_outputs=True)


def _constant_of(output: Any) -> np.ndarray | None:
    """Return a constant in float32, reshaped and converted as the graph does; None for others."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return node.get_data().astype(np.float32)
    if kind in ("Reshape", "Convert"):
        values = _constant_of(node.input_value(0))
        return None if values is None else values.reshape(node.get_output_shape(0))
    return None


def _replace(node: Any, other: Any) -> None:
    """Let what takes the output of `node` take that of `other`, which takes over the name."""
    other.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(other.output(0))
