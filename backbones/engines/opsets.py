"""ONNX files of opset 18, the oldest that PyTorch's exporter writes, in older opsets.

Few operations of our graphs differ there: axes are attributes instead of inputs, and what is new is
spelled out. What an old opset lacks besides is found by ONNX's own checker and refused.
"""

from pathlib import Path
from typing import Any

import numpy as np

from backbones.optional import optional_import

__all__ = ["EXPORTED", "OLDEST", "lower_opset"]

OLDEST, EXPORTED = 11, 18
# Operations whose second input was an attribute, of this name, before an opset.
_ATTRIBUTES = {
    **{
        f"Reduce{kind}": ("axes", 18)
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
    "ReduceSum": ("axes", 13),
    "Squeeze": ("axes", 13),
    "Unsqueeze": ("axes", 13),
    "Split": ("split", 13),
}
# The number of outputs is known without it; sizes of zero are of empty maps only.
_SAID_ANYWAY = {"Split": "num_outputs", "Reshape": "allowzero"}
_FLOAT = 1


def lower_opset(path: Path, opset: int) -> None:
    """Rewrite an ONNX file for an older opset, in place; ValueError, or what ONNX's checker raises,
    where the graph has no form in it."""
    onnx = optional_import("onnx", "onnx")
    model = onnx.load(str(path), load_external_data=False)
    lowering = _Lowering(onnx, model.graph, opset)
    nodes = [new for node in model.graph.node for new in lowering.of(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for one in model.opset_import:
        if one.domain == "":
            one.version = opset
    # Programs that want an old opset do not read a new version of the file format either.
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)


class _Lowering:
    """The nodes of a graph in an older opset."""

    def __init__(self, onnx: Any, graph: Any, opset: int) -> None:
        self.onnx, self.opset = onnx, opset
        self.tensors = {one.name: one for one in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.tensors[node.output[0]] = node.attribute[0].t

    def of(self, node: Any) -> list[Any]:
        """Return the nodes that take a node's place."""
        if node.domain not in ("", "ai.onnx"):
            return [node]
        spelled_out = {
            "LayerNormalization": (17, self._layer_norm),
            "HardSwish": (14, self._hard_swish),
            "Shape": (15, self._shape),
            "Softmax": (13, self._softmax),
            "LessOrEqual": (12, self._not_greater),
            "GreaterOrEqual": (12, self._not_less),
            "Resize": (13, self._resize),
        }
        since, form = spelled_out.get(node.op_type, (0, self._changed))
        return form(_Nodes(self.onnx, node)) if self.opset < since else self._changed(node)

    def _changed(self, node: Any) -> list[Any]:
        """Return a node with inputs as attributes, and without attributes that say nothing new."""
        attribute = self.onnx.helper.make_attribute
        name, since = _ATTRIBUTES.get(node.op_type, ("", 0))
        if self.opset < since and len(node.input) > 1:
            if node.input[1]:
                node.attribute.append(attribute(name, self._values(node.input[1])))
            del node.input[1:]
        given = _attributes(self.onnx, node)
        if node.op_type == "Softmax" and self.opset < 13:
            del node.attribute[:]
            node.attribute.append(attribute("axis", -1))
        old, new = (self._schema(node.op_type, opset) for opset in (self.opset, EXPORTED))
        for one in list(node.attribute):
            if one.name in old.attributes or one.name not in new.attributes:
                continue
            default = self.onnx.helper.get_attribute_value(new.attributes[one.name].default_value)
            if given[one.name] == default or _SAID_ANYWAY.get(node.op_type) == one.name:
                node.attribute.remove(one)
        return [node]

    def _schema(self, kind: str, opset: int) -> Any:
        try:
            return self.onnx.defs.get_schema(kind, opset)
        except self.onnx.defs.SchemaError:
            raise ValueError(kind) from None

    def _values(self, name: str) -> list[int]:
        """Return the values of a constant."""
        if name not in self.tensors:
            raise ValueError(f"{name}, which is computed")
        return [int(i) for i in self.onnx.numpy_helper.to_array(self.tensors[name]).ravel()]

    def _layer_norm(self, nodes: "_Nodes") -> list[Any]:
        x, scale, *bias = nodes.node.input
        given = {"axis": -1, "epsilon": 1e-5, **_attributes(self.onnx, nodes.node)}
        if given["axis"] >= 0:
            raise ValueError(f"LayerNormalization from axis {given['axis']} on")
        axes = list(range(given["axis"], 0))
        kind = self.tensors[scale].data_type if scale in self.tensors else _FLOAT
        if kind != _FLOAT:  # which statistics are computed in
            x = nodes.add("Cast", x, to=_FLOAT)
        x = nodes.add("Sub", x, nodes.add("ReduceMean", x, axes=axes))
        variance = nodes.add("ReduceMean", nodes.add("Mul", x, x), axes=axes)
        variance = nodes.add("Add", variance, nodes.constant(given["epsilon"], np.float32))
        x = nodes.add("Div", x, nodes.add("Sqrt", variance))
        if kind != _FLOAT:
            x = nodes.add("Cast", x, to=kind)
        x = nodes.add("Mul", x, scale)
        if bias:
            nodes.add("Add", x, *bias)
        return nodes.ending()

    def _hard_swish(self, nodes: "_Nodes") -> list[Any]:
        (x,) = nodes.node.input
        nodes.add("Mul", x, nodes.add("HardSigmoid", x, alpha=1 / 6, beta=0.5))
        return nodes.ending()

    def _shape(self, nodes: "_Nodes") -> list[Any]:
        given = _attributes(self.onnx, nodes.node)
        sizes = nodes.add("Shape", *nodes.node.input)
        if given:
            ends = (given.get("start", 0), given.get("end", 2**31 - 1))
            nodes.add("Slice", sizes, *(nodes.constant([end]) for end in ends))
        return nodes.ending()

    def _softmax(self, nodes: "_Nodes") -> list[Any]:
        # The older form takes all axes from the given one on as one.
        axis = _attributes(self.onnx, nodes.node).get("axis", -1)
        if axis == -1:
            return self._changed(nodes.node)
        (x,) = nodes.node.input
        x = nodes.add("Exp", nodes.add("Sub", x, nodes.add("ReduceMax", x, axes=[axis])))
        nodes.add("Div", x, nodes.add("ReduceSum", x, axes=[axis]))
        return nodes.ending()

    def _not_greater(self, nodes: "_Nodes") -> list[Any]:
        nodes.add("Not", nodes.add("Greater", *nodes.node.input))
        return nodes.ending()

    def _not_less(self, nodes: "_Nodes") -> list[Any]:
        nodes.add("Not", nodes.add("Less", *nodes.node.input))
        return nodes.ending()

    def _resize(self, nodes: "_Nodes") -> list[Any]:
        # Region and scales must be there, and may be empty.
        given = [name or nodes.constant([], np.float32) for name in nodes.node.input]
        nodes.node.input[:] = given
        return [*nodes.made, *self._changed(nodes.node)]


class _Nodes:
    """Nodes that together take the place of one."""

    def __init__(self, onnx: Any, node: Any) -> None:
        self.onnx, self.node = onnx, node
        self.made: list[Any] = []

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        name = f"{self.node.output[0]}/{len(self.made)}"
        self.made.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, value: Any, kind: type = np.int64) -> str:
        """Add a constant and return its name."""
        tensor = self.onnx.numpy_helper.from_array(np.asarray(value, kind))
        return self.add("Constant", value=tensor)

    def ending(self) -> list[Any]:
        """Return the nodes; the last one's output is that of the node they replace."""
        self.made[-1].output[0] = self.node.output[0]
        return self.made


def _attributes(onnx: Any, node: Any) -> dict[str, Any]:
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
