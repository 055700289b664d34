"""Core ML programs computed by PyTorch: no system but Apple's runs them.

It knows the operations that our models leave in and says which one is missing. Arithmetic is in
float32; what a program keeps in fp16 is rounded to it, so that values beyond its range show.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F


def _axes(a):
    return [int(n) for n in a["axes"]] if a.get("axes") is not None else None


def _reduce(function):
    return lambda x, a: function(x, dim=_axes(a), keepdim=bool(a["keep_dims"]))


def _padded(x, a, value=0.0):
    """Pad as convolutions and pools say: not at all, or by numbers before and after each axis."""
    pad = a.get("pad")
    assert a["pad_type"] in ("valid", "custom"), a["pad_type"]
    if a["pad_type"] == "valid":
        return x
    (top, bottom), (left, right) = np.reshape(np.asarray(pad), (2, 2)).tolist()
    return F.pad(x, (left, right, top, bottom), value=value)


def _conv(x, a):
    sizes = {"stride": a["strides"], "dilation": a["dilations"], "groups": a["groups"]}
    sizes = {name: np.asarray(value).tolist() for name, value in sizes.items()}
    return F.conv2d(_padded(x, a), a["weight"], a.get("bias"), **sizes)


def _pool(x, a, function):
    is_mean, ceil = function is F.avg_pool2d, bool(a.get("ceil_mode"))
    assert not (is_mean and ceil) or a["exclude_padding_from_average"]

    def pooled(x, value):
        sizes = [np.asarray(a[name]).tolist() for name in ("kernel_sizes", "strides")]
        return function(_padded(x, a, value), *sizes, ceil_mode=ceil)

    y = pooled(x, 0.0 if is_mean else float("-inf"))
    return y / pooled(torch.ones_like(x), 0.0) if a.get("exclude_padding_from_average") else y


def _slice(x, a):
    def mask(name):
        return a[name] if a.get(name) is not None else [False] * x.ndim

    steps = a["stride"] if a.get("stride") is not None else [1] * x.ndim
    masks = (mask("begin_mask"), mask("end_mask"), mask("squeeze_mask"))
    for axis, (begin, end, step, first, last, squeezed) in reversed(
        [*enumerate(zip(a["begin"], a["end"], steps, *masks))]
    ):
        if squeezed:
            x = x.select(axis, int(begin))
            continue
        places = range(x.shape[axis])[
            None if first else int(begin) : None if last else int(end) : int(step)
        ]
        x = x.index_select(axis, torch.tensor([*places], dtype=torch.long))
    return x


def _split(x, a):
    sizes = a.get("split_sizes")
    axis = int(a["axis"])
    if sizes is None:
        return x.chunk(int(a["num_splits"]), axis)
    return x.split([int(n) for n in sizes], axis)


def _pad(x, a):
    pairs = np.reshape(np.asarray(a["pad"]), (-1, 2))[::-1].flatten().tolist()
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}
    value = {"value": float(a["constant_val"])} if a["mode"] == "constant" else {}
    return F.pad(x, pairs, modes[str(a["mode"])], **value)


def _concat(x, a):
    values, axis = a["values"], int(a["axis"])
    if not a["interleave"]:
        return torch.cat(values, axis)
    return torch.stack(values, axis % values[0].ndim + 1).flatten(axis, axis + 1)


def _expand(x, a):
    for axis in sorted(axis % (x.ndim + len(a["axes"])) for axis in _axes(a)):
        x = x.unsqueeze(axis)
    return x


def _batch_norm(x, a):
    return F.batch_norm(
        x, a["mean"], a["variance"], a.get("gamma"), a.get("beta"), eps=float(a["epsilon"])
    )


def _layer_norm(x, a):
    axes = _axes(a)
    assert [axis % x.ndim for axis in axes] == [*range(x.ndim - len(axes), x.ndim)]
    shape = x.shape[-len(axes) :]
    return F.layer_norm(x, shape, a.get("gamma"), a.get("beta"), float(a["epsilon"]))


def _upsample(x, a, mode):
    factors = [float(a[f"scale_factor_{side}"]) for side in ("height", "width")]
    sizes = [round(n * factor) for n, factor in zip(x.shape[2:], factors)]
    align = {} if mode == "nearest" else {"align_corners": bool(a["align_corners"])}
    return F.interpolate(x, sizes, mode=mode, **align)


def _matmul(x, a):
    y = a["y"].transpose(-1, -2) if a.get("transpose_y") else a["y"]
    return (x.transpose(-1, -2) if a.get("transpose_x") else x) @ y


def _topk(x, a):
    k, axis, largest = int(a["k"]), int(a["axis"]), not a["ascending"]
    found = x.topk(k, axis, largest=largest, sorted=bool(a["sort"]))
    return (found.values, found.indices) if a["return_indices"] else found.values


def _cumsum(x, a):
    assert not a["exclusive"] and not a["reverse"]
    return x.cumsum(int(a["axis"]))


def _gather(x, a):
    assert a.get("validate_indices") in (None, False)
    indices, axis = a["indices"].long(), int(a["axis"]) % x.ndim
    assert not int(a.get("batch_dims") or 0)
    y = x.index_select(axis, indices.flatten() % x.shape[axis])
    return y.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_along_axis(x, a):
    assert a.get("validate_indices") in (None, False)
    return x.gather(int(a["axis"]), a["indices"].long())


def _scatter(x, a):
    modes = {"add": "sum", "update": None}
    axis, indices = int(a["axis"]), a["indices"].long()
    assert a.get("validate_indices") in (None, False)
    if modes[str(a["mode"])] is None:
        return x.scatter(axis, indices, a["updates"])
    return x.scatter_reduce(axis, indices, a["updates"], "sum")


def _classify(probabilities, a):
    labels = [str(label) for label in a["classes"]]
    found = dict(zip(labels, probabilities.flatten().tolist(), strict=True))
    return max(found, key=found.get), found


_KINDS = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
_GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
# (the main input, all inputs by name) -> output
OPERATIONS = {
    "add": lambda x, a: x + a["y"],
    "sub": lambda x, a: x - a["y"],
    "mul": lambda x, a: x * a["y"],
    "real_div": lambda x, a: x / a["y"],
    "floor_div": lambda x, a: x // a["y"],
    "maximum": lambda x, a: torch.maximum(x, a["y"]),
    "minimum": lambda x, a: torch.minimum(x, a["y"]),
    "pow": lambda x, a: x ** a["y"],
    "greater": lambda x, a: x > a["y"],
    "greater_equal": lambda x, a: x >= a["y"],
    "less": lambda x, a: x < a["y"],
    "less_equal": lambda x, a: x <= a["y"],
    "equal": lambda x, a: x == a["y"],
    "logical_and": lambda x, a: x & a["y"],
    "select": lambda x, a: torch.where(a["cond"], a["a"], a["b"]),
    "abs": lambda x, a: x.abs(),
    "sign": lambda x, a: x.sign(),
    "cos": lambda x, a: x.cos(),
    "sin": lambda x, a: x.sin(),
    "exp": lambda x, a: x.exp(),
    "log": lambda x, a: (x + float(a["epsilon"])).log(),
    "square": lambda x, a: x * x,
    "sqrt": lambda x, a: x.sqrt(),
    "rsqrt": lambda x, a: (x + float(a["epsilon"])).rsqrt(),
    "clip": lambda x, a: x.clamp(float(a["alpha"]), float(a["beta"])),
    "relu": lambda x, a: x.relu(),
    "relu6": lambda x, a: x.clamp(0, 6),
    "thresholded_relu": lambda x, a: torch.where(x >= float(a["alpha"]), x, 0.0),
    "sigmoid": lambda x, a: x.sigmoid(),
    "sigmoid_hard": lambda x, a: (x * float(a["alpha"]) + float(a["beta"])).clamp(0, 1),
    "silu": lambda x, a: F.silu(x),
    "softplus": lambda x, a: F.softplus(x),
    "gelu": lambda x, a: F.gelu(x, approximate=_GELU[str(a["mode"])]),
    "softmax": lambda x, a: x.softmax(int(a["axis"])),
    "conv": _conv,
    "linear": lambda x, a: F.linear(x, a["weight"], a.get("bias")),
    "matmul": _matmul,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "avg_pool": lambda x, a: _pool(x, a, F.avg_pool2d),
    "max_pool": lambda x, a: _pool(x, a, F.max_pool2d),
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "reduce_max": _reduce(torch.amax),
    "reduce_min": _reduce(torch.amin),
    "reduce_l2_norm": _reduce(torch.linalg.vector_norm),
    "reduce_argmax": lambda x, a: x.argmax(int(a["axis"]), keepdim=bool(a["keep_dims"])),
    "cumsum": _cumsum,
    "topk": _topk,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "scatter_along_axis": _scatter,
    "cast": lambda x, a: x.to(_KINDS[str(a["dtype"])]),
    "reshape": lambda x, a: x.reshape([int(n) for n in a["shape"]]),
    "transpose": lambda x, a: x.permute([int(n) for n in a["perm"]]),
    "expand_dims": _expand,
    "squeeze": lambda x, a: x.squeeze(tuple(_axes(a))),
    "tile": lambda x, a: x.tile([int(n) for n in a["reps"]]),
    "concat": _concat,
    "stack": lambda x, a: torch.stack(a["values"], int(a["axis"])),
    "split": _split,
    "slice_by_index": _slice,
    "pad": _pad,
    "upsample_bilinear": lambda x, a: _upsample(x, a, "bilinear"),
    "upsample_nearest_neighbor": lambda x, a: _upsample(x, a, "nearest"),
    "classify": _classify,
}
_MAIN = ("x", "data", "probabilities", "cond")


class _Inputs(dict):
    """What goes into an operation; tells what its function did not look at."""

    def __init__(self, given):
        super().__init__(given)
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def passed_over(self):
        left = [key for key in self if key not in self.seen]
        return {key for key in left if dict.get(self, key) is not None}


class Package:
    """A package as it was saved.

    It has a `description`, `facts` that we wrote into it, and `operations`; called with an input it
    gives its outputs by name.
    """

    def __init__(self, path):
        import coremltools
        from coremltools.converters.mil.frontend.milproto.load import load

        package = coremltools.models.MLModel(str(path), skip_model_load=True)
        spec = package.get_spec()
        self.description = spec.description
        program = load(spec, spec.specificationVersion, package.weights_dir)
        self.facts = json.loads(spec.description.metadata.userDefined["backbones"])
        self.main = program.functions["main"]
        self.operations = [one for one in self.main.operations if one.op_type != "const"]

    def __call__(self, x):
        """Compute for one input: float32 (B, C, H, W), of an image the gray levels."""
        (name,) = self.main.inputs
        known = {self.main.inputs[name]: x.float()}
        for operation in self.operations:
            given = {key: self._value(one, known) for key, one in operation.inputs.items()}
            given = _Inputs(given)
            main = next((given[key] for key in _MAIN if key in given), None)
            found = OPERATIONS[operation.op_type](main, given)
            assert not given.passed_over(), (operation.op_type, given.passed_over())
            several = isinstance(found, tuple)
            for output, value in zip(operation.outputs, found if several else (found,)):
                known[output] = _rounded(output, value)
        return {output.name: known[output] for output in self.main.outputs}

    def _value(self, one, known):
        """Return an input's value: what was computed, or constants, arrays as tensors."""
        if one is None:
            return None
        if isinstance(one, list | tuple):
            return [self._value(each, known) for each in one]
        if one in known:
            return known[one]
        value = one.val
        if isinstance(value, np.ndarray) and value.dtype.kind in "fib":
            value = torch.from_numpy(value.astype(np.float32) if value.dtype.kind == "f" else value)
        elif isinstance(value, np.floating):
            value = torch.tensor(float(value))
        return value


def _rounded(output, value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        from coremltools.converters.mil.mil import types

        assert tuple(value.shape) == tuple(output.shape), (output.op.op_type, output.name)
        return value.half().float() if output.dtype == types.fp16 else value
    return value
