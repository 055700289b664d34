"""Reading checkpoint files of strangers: safetensors and `torch.save`, never running code."""

import json
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from backbones.errors import CheckpointError, WeightsUnavailableError
from backbones.weights.untrusted.safetensors_header import MAX_TENSORS, parse_header
from backbones.weights.untrusted.state_dicts import names_in, open_content
from backbones.weights.untrusted.torch_files import CONVERTER, load_archive, load_pickle

__all__ = [
    "CHECKPOINT_SUFFIXES",
    "Checkpoint",
    "opened",
    "read_checkpoint",
    "read_content",
    "read_description",
    "read_metadata",
]

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
"""What checkpoint files are usually named; their content decides."""
_NOT_A_CHECKPOINT = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; run 'git lfs pull' there"),
    (b"<", "a web page or other markup; open the address in a browser and fetch the file itself"),
    (b"\x1f\x8b", "a gzip archive; unpack it and give the checkpoint inside"),
    (b"\x89hdf", "an HDF5 file (Keras); give PyTorch weights"),
    (b"\x93numpy", "a NumPy array; give PyTorch weights"),
)

_DESCRIPTION = {
    "name": str,
    "family": str,
    "arguments": dict,
    "deploy": bool,
    "license": str,
    "classes": list,
    "input": dict,
}
_MAX_DEPTH = 12  # of nested containers
_MAX_SHARING = 8  # how often the entries of a state dict may repeat the bytes of the file


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors as they were stored, and what was beside them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """A safetensors file's metadata; empty for other formats."""
    wrapper: str | None = None
    """Where the tensors were found, e.g. ``model`` or ``ema[0.9998]``; None for a bare dict."""
    others: tuple[str, ...] = ()
    """Names of entries beside the tensors that are none, such as ``epoch``."""
    source: str = "the checkpoint"
    """The file, for messages."""
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of further mappings of the file, such as ``student.stem.0.weight``."""
    model_names: tuple[str, ...] = ()
    """What the training script that wrote it called the model, such as ``args.model``."""

    @cached_property
    def description(self) -> Mapping[str, Any]:
        """What `save_checkpoint` wrote of the model; empty for files of others."""
        return _description(self.metadata, self.source)

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Names of mappings that were not opened and hold as many tensors or more."""
        counts = Counter(key.partition(".")[0] for key in self.beside)
        return tuple(name for name, count in counts.items() if count >= len(self.tensors))

    @property
    def deploy(self) -> bool:
        """Whether `save_checkpoint` wrote it from a re-parameterized model."""
        return bool(self.description.get("deploy"))


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Read a safetensors file or one written by `torch.save`, told apart by their content.

    No code is ever run, and no option allows it: pickles go through a list of what they may name
    and PyTorch's weights-only reader. Memory and time are bounded by the size of the file.

    Raises:
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        UnsafeCheckpointError: reading would run code; the message names what was blocked.
        CheckpointError: the file is damaged, cut short or no checkpoint.
    """
    path, size, kind, head, metadata = _recognized(path)
    if kind == "safetensors":
        try:
            tensors: Any = safetensors.torch.load_file(path)
        except Exception as error:  # SafetensorError and whatever PyTorch raises
            raise CheckpointError(f"{path}: damaged ({error}); fetch the file again") from error
    else:
        tensors = load_archive(path, size) if kind == "zip" else load_pickle(path, head, size)
    checkpoint = opened(tensors, str(path), metadata)
    for found in (checkpoint.tensors, checkpoint.beside):
        _refuse_excess(path, found, size)
    return checkpoint


def opened(content: Any, source: str, metadata: dict[str, str] | None = None) -> Checkpoint:
    """Find the state dict in what a file holds, or raise as `unwrap`, with the name of `source`."""
    with _naming(source):
        tensors, wrapper, others, beside = open_content(content)
    names = names_in(content)
    return Checkpoint(tensors, metadata or {}, wrapper, others, source, beside, names)


def read_content(path: str | PathLike[str]) -> dict[str, Any]:
    """Read the mapping that a file of `torch.save` holds, as safely as `read_checkpoint`.

    It has tensors, numbers, texts and containers of them. The tensors are copies, so that the file
    may be replaced.

    Raises:
        CheckpointError: as `read_checkpoint`, or the file holds no mapping.
    """
    path, size, kind, head, _ = _recognized(path)
    if kind == "safetensors":
        raise CheckpointError(f"{path}: a safetensors file holds weights alone")
    content = load_archive(path, size) if kind == "zip" else load_pickle(path, head, size)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path}: no mapping by names; give a training checkpoint")
    tensors: dict[str, Tensor] = {}
    with _naming(path):
        _copied(content, lambda name, tensor: tensors.setdefault(name, tensor), {})
    _refuse_excess(path, tensors, size)
    return _copied(content, lambda name, tensor: tensor.clone(), {})


def _copied(
    content: Any,
    copy: Callable[[str, Tensor], Tensor],
    done: dict[int, Any],
    name: str = "",
    depth: int = 0,
) -> Any:
    """Copy nested containers, each once however often it is shared."""
    if isinstance(content, Tensor):
        return copy(name, content)
    if not isinstance(content, (Mapping, list, tuple)):
        return content
    if id(content) in done:
        if done[id(content)] is None:
            raise CheckpointError("its contents are nested without end; do not use this file")
        return done[id(content)]
    if depth > _MAX_DEPTH:
        raise CheckpointError("its contents are nested too deeply; do not use this file")
    done[id(content)] = None  # until it is complete
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    copies = {key: _copied(item, copy, done, f"{name}.{key}", depth + 1) for key, item in items}
    result: Any = copies if isinstance(content, Mapping) else list(copies.values())
    done[id(content)] = tuple(result) if isinstance(content, tuple) else result
    return done[id(content)]


def read_description(path: str | PathLike[str]) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote of the model into a file; empty for files of others.

    Whether a file of `torch.save` is intact is seen when its weights are read.

    Raises:
        WeightsUnavailableError: there is no such file.
        CheckpointError: it is no checkpoint, or no intact safetensors file.
    """
    path, _, _, _, metadata = _recognized(path)
    return dict(_description(metadata, path))


def read_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a safetensors file, reading its header only.

    The entry ``backbones``, where `save_checkpoint` wrote one, is returned decoded.

    Raises:
        WeightsUnavailableError: there is no such file.
        CheckpointError: it is no intact safetensors file.
    """
    path, _, kind, _, header = _recognized(path)
    if kind != "safetensors":
        raise CheckpointError(f"{path}: only safetensors files carry metadata")
    metadata: dict[str, Any] = {**header}
    if "backbones" in metadata:
        metadata["backbones"] = _description(metadata, path)
    return metadata


def _recognized(given: str | PathLike[str]) -> tuple[Path, int, str, bytes, dict[str, str]]:
    """Return path, size, kind, first bytes and, of a safetensors file, the metadata."""
    path = Path(given)
    size = _size(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
            kind = _kind(path, head, size)
            metadata = parse_header(path, stream, size) if kind == "safetensors" else {}
            return path, size, kind, head, metadata
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check its rights") from error


@contextmanager
def _naming(path: object) -> Iterator[None]:
    """Put the file's name in front of what is wrong with its content."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _refuse_excess(path: Path, tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors that declare more than the file holds.

    A tensor of stride 0 declares any size over one stored number, many tensors can share all of
    the file, and one without values can have any other size.
    """
    total = 0
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{path}: holds {len(tensors)} tensors; do not use this file")
    for key, tensor in tensors.items():
        declared = tensor.numel() * tensor.element_size()
        total += declared
        if max(declared, *tensor.shape, 0) > size or total > _MAX_SHARING * size:
            raise CheckpointError(
                f"{path}: tensor {key[:80]!r} declares more values than the file holds; "
                "do not use this file"
            )


def _description(metadata: Mapping[str, Any], source: object) -> Mapping[str, Any]:
    """Return what `save_checkpoint` wrote into a file's metadata; empty for files of others."""
    try:
        ours = json.loads(metadata.get("backbones", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: the metadata 'backbones' is no JSON: {error}") from error
    if not isinstance(ours, Mapping):
        raise CheckpointError(f"{source}: the metadata 'backbones' is no JSON object")
    for key, kind in _DESCRIPTION.items():
        if not isinstance(ours.get(key), kind | None):
            raise CheckpointError(
                f"{source}: the metadata 'backbones' has a wrong {key!r}; the file is damaged or "
                "forged, fetch it again"
            )
    return ours


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise WeightsUnavailableError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check path and rights") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise CheckpointError(f"{path}: {kind}; give the checkpoint file itself")
    if status.st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; fetch it again")
    return status.st_size


def _kind(path: Path, head: bytes, size: int) -> str:
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: a tar archive; unpack it and give the checkpoint inside, or, where it is one "
            f"of PyTorch from before 2017 that you trust, convert it with {CONVERTER}"
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what in _NOT_A_CHECKPOINT:
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {what}")
    raise CheckpointError(
        f"{path}: {size} bytes that are neither safetensors nor a file of torch.save, "
        "or one cut short; give the checkpoint file itself"
    )
