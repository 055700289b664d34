"""The same computation in operations that OpenVINO has faster kernels for.

Both rewrites are for models whose shapes are known, so they are done when a file is opened: with a
free batch size OpenVINO would carry the permutations out, and a file that held them be slower.
"""

from typing import Any

import numpy as np

from backbones.engines.openvino.nodes import constant_of, replace
from backbones.optional import optional_import

__all__ = ["norms_on_rows", "scales_into_weights"]

# A convolution puts weights that are no constants in order at every call. That is cheaper than to
# scale its map where it has this many positions for each channel of the result.
POSITIONS_PER_CHANNEL = 50


def norms_on_rows(model: Any) -> int:
    """Divide maps by the root mean square of their channels with the channels at the end, in place.

    OpenVINO has a kernel for that. Its layout of maps has the channels at the end already, so the
    permutations around the kernel are nothing.

    Args:
        model: an ``openvino.Model`` whose shapes are known.

    Returns:
        The number of norms.
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
        replace(node, ops.transpose(rows, [0, 3, 1, 2]))
        count += 1
    return count


def scales_into_weights(model: Any) -> list[tuple[int, ...]]:
    """Scale the weights of 1x1 convolutions instead of the channels of their large maps, in place.

    Args:
        model: an ``openvino.Model`` whose shapes are known.

    Returns:
        The shapes (B, C, H, W) of the maps that are no longer scaled.
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
        by_channel = tuple(scale.get_shape()) == (1, channels, 1, 1) and constant_of(scale) is None
        if by_channel and height * width >= POSITIONS_PER_CHANNEL * weights.get_shape()[0]:
            weights = ops.multiply(weights, scale)
            replace(node, ops.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1]))
            spared.append(shape)
    return spared


def _root_mean_square(node: Any) -> tuple[Any, float] | None:
    """Match ``x * (1 / sqrt(mean(x ** 2) + eps))``, the mean over channels; return x and eps."""
    divide = _operand(node, "Multiply", 1)
    add = _operand(_operand(divide, "Divide", 1), "Sqrt", 0)
    power = _averaged(_operand(add, "Add", 0))
    if power is None or power.get_type_name() != "Power":
        return None
    x = node.input_value(0)
    one, two = constant_of(divide.input_value(0)), constant_of(power.input_value(1))
    eps = constant_of(add.input_value(1))
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
    x, other = node.input_value(0), constant_of(node.input_value(1))
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
