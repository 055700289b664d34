"""Changes of a program's graph before XNNPACK takes its part: no arithmetic on sizes remains."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from backbones.optional import optional_import

__all__ = ["simplified", "with_constants", "with_plain_attention"]


def with_plain_attention(program: Any) -> Any:
    """Write the attention of a recorded program as products and softmax.

    PyTorch's own definition also looks for rows in which a mask forbids everything, in a dozen of
    operations that XNNPACK does not know. No model of ours has a mask.
    """
    fused = torch.ops.aten.scaled_dot_product_attention.default
    return program.run_decompositions({fused: _attention})


def with_constants(program: Any) -> Any:
    """Compute beforehand what depends on no input: masks and indices of places, biases looked up.

    It is for programs in float32; dequantized weights would be such constants too.
    """
    folding = optional_import("executorch.exir.passes.constant_prop_pass", "executorch")
    program = folding.constant_prop_pass(program)
    # Strides of a transpose, even along an axis of one, are the order of the axes to ExecuTorch.
    plain = partial(torch.clone, memory_format=torch.contiguous_format)
    for name, value in program.constants.items():
        if isinstance(value, Tensor):
            program.constants[name] = plain(value)
    for node in program.graph.find_nodes(op="placeholder"):
        if node.target in program.graph_signature.inputs_to_lifted_tensor_constants:
            node.meta["val"] = plain(node.meta["val"])
    return program


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return NotImplemented
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def simplified(module: Any) -> Any:
    """Write shapes, copies, splits and products of an edge program as XNNPACK takes them.

    Expansions to the shape that is there already are left out. A free size among known ones is
    inferred. Splits of maps whose sizes are known are slices. Axes of one are added and dropped by
    views, and selected by slices. Single products of maps are batches of one, as XNNPACK multiplies
    maps in batches only.
    """
    bases = optional_import("torch.fx.passes.infra.pass_base", "executorch")
    ops = optional_import("executorch.exir.dialects._ops", "executorch").ops.edge.aten
    axes = (ops.unsqueeze_copy.default, ops.squeeze_copy.dim, ops.squeeze_copy.dims)
    for node in list(module.graph.nodes):
        if node.target in axes:
            _view(node, ops.view_copy.default)
        elif node.target == ops.mm.default:
            _multiply_in_batch(node, module.graph, ops)
        elif node.target == ops.expand_copy.default:
            _leave_out_if_same(node)
        elif node.target == ops.view_copy.default:
            _infer_free_size(node)
        elif node.target == ops.split_with_sizes_copy.default:
            _slice(node, module.graph, ops.slice_copy.Tensor)
        elif node.target == ops.select_copy.int:
            _select(node, module.graph, ops)
    module.graph.eliminate_dead_code()
    module.recompile()
    return bases.PassResult(module, True)


def _leave_out_if_same(node: Any) -> None:
    """Let an expansion's input take its place where both have the same shape."""
    before, after = node.args[0].meta["val"], node.meta["val"]
    if before.shape == after.shape and before.dtype == after.dtype:
        node.replace_all_uses_with(node.args[0])


def _view(node: Any, operator: Any) -> None:
    """Write an added or dropped axis as a view, unless two sizes of its result are free."""
    shape = [*node.meta["val"].shape]
    if sum(not isinstance(size, int) for size in shape) < 2:
        node.target, node.args = operator, (node.args[0], shape)
        _infer_free_size(node)


def _infer_free_size(node: Any) -> None:
    """Write the one free size of a new shape as -1."""
    shape = list(node.args[1])
    free = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(free) == 1 and -1 not in shape:
        shape[free[0]] = -1
        node.args = (node.args[0], shape)


def _multiply_in_batch(node: Any, graph: Any, ops: Any) -> None:
    """Write a product of two matrices of known sizes as a batch of one product."""
    if node.args[1].op == "placeholder":  # weights
        return
    values = [one.meta["val"] for one in (*node.args, node)]
    if not all(isinstance(size, int) for value in values for size in value.shape):
        return

    def call(operator: Any, *args: Any, value: Any) -> Any:
        made = graph.call_function(operator, args)
        made.meta = {**node.meta, "val": value}
        return made

    with graph.inserting_before(node):
        batches = [
            call(ops.view_copy.default, one, [1, *value.shape], value=value[None])
            for one, value in zip(node.args, values)
        ]
        product = call(ops.bmm.default, *batches, value=values[-1][None])
        result = call(ops.view_copy.default, product, [*values[-1].shape], value=values[-1])
    node.replace_all_uses_with(result)


def _slice(node: Any, graph: Any, operator: Any) -> None:
    """Write a split as slices."""
    x, sizes = node.args[0], node.args[1]
    axis = (node.args[2] if len(node.args) > 2 else 0) % x.meta["val"].dim()
    if not all(isinstance(size, int) for size in x.meta["val"].shape):
        return
    ends = torch.tensor(sizes).cumsum(0).tolist()
    for taken in list(node.users):
        number = taken.args[1]
        with graph.inserting_before(taken):
            start = ends[number] - sizes[number]
            part = graph.call_function(operator, (x, axis, start, ends[number]))
        part.meta = dict(taken.meta)
        taken.replace_all_uses_with(part)


def _select(node: Any, graph: Any, ops: Any) -> None:
    """Write the choice of one place along an axis as a slice, and drop the axis by a view."""
    x, axis, place = node.args
    before, after = x.meta["val"], node.meta["val"]
    if not all(isinstance(size, int) for size in (*before.shape, place)):
        return
    axis, place = axis % before.dim(), place % before.shape[axis]
    with graph.inserting_before(node):
        part = graph.call_function(ops.slice_copy.Tensor, (x, axis, place, place + 1))
    part.meta = {**node.meta, "val": after.unsqueeze(axis)}
    node.target, node.args = ops.view_copy.default, (part, [*after.shape])
