"""The calls that a checkpoint's pickle may ask for, and the arguments they may have.

A list of names alone would not do: a set copied a million times over, a dict key made of nested
tuples and a storage of a terabyte are all made of harmless names. Every call here is checked for
what it costs, and given a stand-in for its result.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "CALLS",
    "Name",
    "Object",
    "Refused",
    "Storage",
    "checked_key",
    "is_allowed",
    "is_size",
]

_MAX_DIMS = 16
_STORAGES = {
    "torch.BFloat16Storage": 2,
    "torch.BoolStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8,
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.IntStorage": 4,
    "torch.LongStorage": 8,
    "torch.ShortStorage": 2,
    "torch.storage.UntypedStorage": 1,
}


class Refused(Exception):
    """A pickle does something that no checkpoint needs; the message says what."""


@dataclass(frozen=True)
class Name:
    """A class, function or number type that a pickle names."""

    name: str

    @property
    def item_bytes(self) -> int:
        """Bytes of one number, for the name of a number type or of a storage."""
        dtype = _dtype(self.name)
        if dtype is not None:
            return dtype.itemsize
        if self.name not in _STORAGES:
            raise Refused(f"takes {self.name[:80]!r} for a number type")
        return _STORAGES[self.name]


@dataclass(frozen=True)
class Storage:
    """Stands for a block of stored numbers."""

    item_bytes: int
    bytes: int


class _Tensor:
    """Stands for a tensor or a parameter."""


class Object:
    """Stands for an object that takes attributes, or none."""


def is_allowed(name: str) -> bool:
    """Whether a pickle may name this class, function or number type."""
    return name in CALLS or name in _STORAGES or _dtype(name) is not None


def is_size(value: Any) -> bool:
    """Whether `value` is a whole number that may count something."""
    return type(value) is int and 0 <= value < 1 << 48


def checked_key(key: Any) -> Any:
    """Return a dict key whose hash costs little; that of nested tuples can take forever."""
    parts = key if type(key) is tuple and len(key) <= _MAX_DIMS else (key,)
    if not all(part is None or isinstance(part, str | int | float | Name) for part in parts):
        raise Refused(f"uses a {type(key).__name__} as a key")
    return key


# Each of these returns None where the arguments are not those of a checkpoint.


def _namespace() -> Any:
    return Object()


def _complex(*parts: Any) -> Any:
    numbers = all(isinstance(part, int | float) for part in parts)
    return Object() if numbers and len(parts) <= 2 else None


def _set(items: Any = ()) -> Any:
    if not isinstance(items, list | tuple):
        return None
    for item in items:
        checked_key(item)
    return frozenset[Any]()


def _counter(counts: Any = None) -> Any:
    return Counter(counts or {}) if counts is None or isinstance(counts, dict) else None


def _ordered_dict(pairs: Any = ()) -> Any:
    if not isinstance(pairs, list | tuple):
        return None
    result: OrderedDict[Any, Any] = OrderedDict()
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return None
        result[checked_key(pair[0])] = pair[1]
    return result


def _size(sizes: Any = ()) -> Any:
    return tuple(sizes) if _are_sizes(sizes) else None


def _device(kind: Any, index: Any = 0) -> Any:
    return Object() if isinstance(kind, str) and is_size(index) else None


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None) -> Any:
    return data if isinstance(data, _Tensor) and type(requires_grad) is bool and not hooks else None


def _tensor(storage: Any, offset: Any, sizes: Any, strides: Any, item_bytes: int = 0) -> Any:
    shaped = _are_sizes(sizes) and _are_sizes(strides) and len(sizes) == len(strides)
    if not isinstance(storage, Storage) or not is_size(offset) or not shaped:
        return None
    last = offset
    if math.prod(sizes):
        last += 1 + sum((n - 1) * step for n, step in zip(sizes, strides))
    if last * (item_bytes or storage.item_bytes) > storage.bytes:
        raise Refused(f"puts a tensor of shape {tuple(sizes)} beyond the end of its storage")
    return _Tensor()


def _tensor_v2(
    storage: Any,
    offset: Any,
    sizes: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> Any:
    if type(requires_grad) is not bool or hooks or metadata:
        return None
    return _tensor(storage, offset, sizes, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    sizes: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    if type(requires_grad) is not bool or hooks or metadata or not isinstance(dtype, Name):
        return None
    return _tensor(storage, offset, sizes, strides, dtype.item_bytes)


CALLS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": _namespace,  # timm's training checkpoints keep their arguments
    "builtins.complex": _complex,
    "builtins.set": _set,
    "collections.Counter": _counter,  # learning rate schedulers
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}


def _are_sizes(values: Any) -> bool:
    short = isinstance(values, list | tuple) and len(values) <= _MAX_DIMS
    return short and all(map(is_size, values))


def _dtype(name: str) -> torch.dtype | None:
    """Return the number type of a name such as ``torch.float32``."""
    module, _, attribute = name.rpartition(".")
    kind = vars(torch).get(attribute) if module == "torch" else None
    return kind if isinstance(kind, torch.dtype) else None
