"""Reading and replacing nodes of an OpenVINO model."""

from typing import Any

import numpy as np

__all__ = ["constant_of", "replace"]


def constant_of(output: Any) -> np.ndarray | None:
    """Return a constant in float32, reshaped and converted as the graph does; None for others."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return node.get_data().astype(np.float32)
    if kind in ("Reshape", "Convert"):
        values = constant_of(node.input_value(0))
        return None if values is None else values.reshape(node.get_output_shape(0))
    return None


def replace(node: Any, other: Any) -> None:
    """Let what takes the output of `node` take that of `other`, which takes over the name."""
    other.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(other.output(0))
