"""What the operators share: the switch to the reference, and how a path is chosen.

Every operator has a plain reference that is its definition, and faster paths that are tested
against it. Three questions decide the path: is the reference asked for, is somebody recording the
operations (``torch.compile``, ``torch.export``, ``torch.jit.trace``), and are the sizes known.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.func import debug_unwrap

_reference_depth = 0


@contextmanager
def use_reference() -> Iterator[None]:
    """Make every operator compute by its reference inside the ``with`` block.

    The switch is the process's, not the thread's, so that backward passes and worker threads of
    the block see it too. Blocks may be nested. :func:`reference_active` tells whether one is open.
    """
    global _reference_depth
    _reference_depth += 1
    try:
        yield
    finally:
        _reference_depth -= 1


def reference_active() -> bool:
    """Whether a :func:`use_reference` block is open."""
    return _reference_depth > 0


def is_recorded() -> bool:
    """Whether the operations are being recorded rather than only run.

    A recorded path consists of differentiable out-of-place operations of the standard set; it
    holds no custom autograd function and no complex number.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed(*tensors: Tensor) -> bool:
    """Whether ``torch.func`` maps over one of the tensors, or differentiates by it."""
    for tensor in tensors:  # noqa: SIM110 - on small maps a generator is felt
        if debug_unwrap(tensor) is not tensor:
            return True
    return False


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: the promoted type of `tensors`, float32 instead of half types."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves operations on `tensor`'s device alone."""
    device = tensor.device.type
    # Nothing is entered where autocast is off: an exporter would record it as a region.
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


def is_symbolic(*sizes: int) -> bool:
    """Whether a size is left open in the graph being recorded (a dynamic height or width)."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def fixed(size: int) -> int:
    """`size` as a plain integer, whatever records: to unroll loops and to look tables up.

    ``torch.jit.trace`` hands out tensors for sizes and ``torch.compile`` may hold them open, also
    through ``int()``; a range has to be of definite length.
    """
    return len(range(size))


def in_layout_of(x: Tensor, out: Tensor) -> Tensor:
    """`out` in the memory layout of `x`, so that what follows does not mix layouts."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return out.contiguous()
    return out.contiguous(memory_format=torch.channels_last)
