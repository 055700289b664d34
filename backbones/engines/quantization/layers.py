"""The layers of a recorded program that int8 is about: convolutions, linear layers, products."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

__all__ = [
    "CONVOLUTIONS",
    "OPERATORS",
    "Layer",
    "Visitor",
    "layers_of",
    "operator_of",
    "outputs_of",
    "visit_all",
    "walk",
]

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_PRODUCTS = ("matmul", "mm", "bmm")
OPERATORS = (*CONVOLUTIONS, "linear", *_PRODUCTS)


@dataclass(frozen=True)
class Layer:
    """A node that engines compute in int8.

    `name` is the node's, and that of the value that it gives in files by PyTorch's ONNX exporter.
    `modules` are those in which it was recorded, from the outermost on: path and type of each;
    `operator` is the name of its operation.
    `activations` are the positions of operands that images change, with the names of their nodes;
    `weights` are the positions of constant ones.
    """

    name: str
    modules: tuple[tuple[str, str], ...]
    operator: str
    activations: dict[int, str]
    weights: tuple[int, ...]

    @property
    def place(self) -> str:
        """The path of its module."""
        return self.modules[-1][0] if self.modules else ""

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two operands (..., N, K) and (..., K, M)."""
        return self.operator in _PRODUCTS


def layers_of(module: GraphModule) -> dict[str, Layer]:
    """Return the layers of a recorded program by name, in the order of their computation."""
    found, constant = {}, set()
    for node in module.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "get_attr" or (operands and all(one in constant for one in operands)):
            constant.add(node)
        elif (operator := operator_of(node)) in OPERATORS:
            pair = dict(enumerate(node.args[:2]))
            stack = node.meta.get("nn_module_stack", {}).values()
            found[node.name] = Layer(
                name=node.name,
                modules=tuple((path, str(kind)) for path, kind in stack),
                operator=operator,
                activations={i: one.name for i, one in pair.items() if one not in constant},
                weights=tuple(i for i, one in pair.items() if one in constant),
            )
    return found


def outputs_of(module: GraphModule) -> list[str]:
    """Return the names of the values that a program gives; files have names of their own for it."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return [node.name for node in output.all_input_nodes]


def operator_of(node: Node) -> str:
    """Return the name of PyTorch's operation that a node calls; "" for other nodes."""
    target: Any = node.target
    is_operation = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    return target._schema.name.removeprefix("aten::") if is_operation else ""


Visitor = Callable[[Layer, Callable[..., Tensor], list[Any], dict[str, Any], Tensor], None]
"""(layer, operator, operands, keywords, output) -> None, called when a layer was computed."""


class _Walk(Interpreter):
    """A run of a program that shows its layers to a visitor."""

    def __init__(self, module: GraphModule, layers: Mapping[str, Layer], visit: Visitor) -> None:
        super().__init__(module)
        self.layers, self.visit = layers, visit

    def run_node(self, node: Node) -> Any:
        if node.name not in self.layers:
            return super().run_node(node)
        operands, keywords = self.fetch_args_kwargs_from_env(node)
        output = super().run_node(node)
        operator: Any = node.target
        self.visit(self.layers[node.name], operator, list(operands), dict(keywords), output)
        return output


def visit_all(
    module: GraphModule, layers: Mapping[str, Layer], batches: Iterable[Tensor], visit: Visitor
) -> None:
    """Show the layers of a program to a visitor, for batches of images, without gradients."""
    with torch.no_grad():
        for _ in walk(module, layers, batches, visit):
            pass


def walk(
    module: GraphModule, layers: Mapping[str, Layer], batches: Iterable[Tensor], visit: Visitor
) -> Iterator[Tensor]:
    """Yield a program's first output for batches of images, its layers shown to a visitor."""
    run = _Walk(module, layers, visit)
    for batch in batches:
        output = run.run(batch)
        yield output if isinstance(output, Tensor) else output[0]
