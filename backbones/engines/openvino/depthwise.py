"""Depthwise kernels that OpenVINO computes faster when they are padded with zeros.

oneDNN unrolls small depthwise kernels and loops over large ones. Just below the limit the unrolled
code is too long for the processor's caches: here a kernel of 13x13 takes three to four times as
long as one of 15x15. Where the limit lies depends on processor and version, so each shape is
measured once where it runs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from backbones.engines.openvino.nodes import constant_of, replace
from backbones.engines.timing import least
from backbones.optional import optional_import

__all__ = ["milliseconds", "widen_depthwise"]

NARROW = (9, 11, 13)
WIDE = 15
ROUNDS, TURNS = 10, 4  # calls of each kernel in a row, and how often that is done


def widen_depthwise(model: Any, options: dict[str, Any]) -> list[tuple[int, ...]]:
    """Pad depthwise kernels of an OpenVINO model with zeros where that is faster, in place.

    Args:
        model: an ``openvino.Model`` whose shapes are known.
        options: what it will be compiled with.

    Returns:
        The (channels, height, width, kernel) that were widened.
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
        weights = constant_of(node.input_value(1))
        if weights is None or not node.input(0).get_partial_shape().is_static:
            continue
        attributes = node.get_attributes()
        plain = all(
            set(attributes[name]) == {value}
            for name, value in (
                ("strides", 1),
                ("dilations", 1),
                ("pads_begin", weights.shape[-1] // 2),
            )
        )
        depthwise = weights.shape[1:3] == (1, 1) and weights.shape[-1] == weights.shape[-2]
        same = attributes["pads_begin"] == attributes["pads_end"]
        if plain and same and depthwise and weights.shape[-1] in NARROW:
            yield node, weights


def _widen(node: Any, weights: np.ndarray) -> None:
    more = (WIDE - weights.shape[-1]) // 2
    wide = np.pad(weights, ((0, 0),) * 3 + ((more, more),) * 2)
    replace(node, _convolution(node.input_value(0), wide))


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
