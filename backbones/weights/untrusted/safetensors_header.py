"""The header of a safetensors file, checked before any library or tensor code sees the file.

A header is data from a stranger: it may declare terabytes, overlapping tensors or a length beyond
the file. Everything is checked against the real file size first, so that reading costs no more
memory than the file itself. Format: 8 bytes little-endian header length, JSON, then the tensors'
bytes without gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from backbones.errors import CheckpointError

__all__ = ["MAX_HEADER_BYTES", "MAX_TENSORS", "parse_header"]

# The model of the zoo with most tensors has 5,000.
MAX_TENSORS = 25_000
MAX_HEADER_BYTES = 8 << 20
_MAX_DIMS = 16
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}


def parse_header(path: Path, stream: BinaryIO, size: int) -> dict[str, str]:
    """Check the header of the safetensors file open as `stream` and return its metadata.

    Raises:
        CheckpointError: the file is cut short, or the header contradicts the file or itself.
    """

    def refuse(what: str) -> NoReturn:
        raise CheckpointError(
            f"{path}: {what}; the safetensors file is damaged or forged, fetch it again"
        )

    stream.seek(0)
    prefix = stream.read(8)
    if len(prefix) < 8:
        refuse(f"only {size} bytes, cut short inside the header length")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        refuse(f"declares a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    if length > size - 8:
        refuse(f"cut short: {size} bytes, but the header alone needs {length + 8}")
    try:
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        refuse(f"the header is no valid JSON ({error})")
    if not isinstance(header, dict):
        refuse("the header is no JSON object")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse("the metadata is no mapping of strings")

    if len(header) > MAX_TENSORS:
        refuse(f"declares {len(header)} tensors")
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        problem = _entry_problem(entry)
        if problem:
            refuse(f"tensor {name[:80]!r}: {problem}")
        begin, end = entry["data_offsets"]
        spans.append((begin, end, name))

    position, available = 0, size - 8 - length
    for begin, end, name in sorted(spans):
        if begin < position:
            refuse(f"tensor {name[:80]!r} overlaps the one before it")
        if begin > position:
            refuse(f"{begin - position} bytes before tensor {name[:80]!r} belong to no tensor")
        position = end
    if position > available:
        refuse(f"cut short: the tensors need {position} bytes, the file holds {available}")
    if position < available:
        refuse(f"{available - position} bytes at the end belong to no tensor")
    return metadata


def _entry_problem(entry: Any) -> str | None:
    """Say what is wrong with one tensor's header entry; None where nothing is."""
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        return f"unknown dtype {str(dtype)[:20]!r}"
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        return "the shape is no short list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return "the offsets are no pair of positions"
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        return f"{dtype} {shape} needs {needed} bytes, declared {offsets[1] - offsets[0]}"
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result
