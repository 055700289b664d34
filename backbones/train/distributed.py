"""The processes of one training run, as torchrun starts them, and this one among them."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.utils import init_distributed_device, is_distributed_env, reduce_tensor
from torch import distributed

from backbones.errors import ConfigError, first_line

__all__ = ["ProcessGroup", "join_process_group"]


@dataclass(frozen=True)
class ProcessGroup:
    """How many processes train together, which one this is, and the device it uses."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def primary(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are several processes."""
        return self.size > 1

    def mean(self, value: float) -> float:
        """Return the mean of a number over all processes."""
        if not self.distributed:
            return value
        own = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(reduce_tensor(own, self.size))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.distributed:
            distributed.barrier()


@contextmanager
def join_process_group(device: str | None) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun (or SLURM) started; otherwise this one is alone.

    Gloo connects processes on CPUs, NCCL those on GPUs; `device` None takes a GPU if there is one.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {first_line(error)}") from None
    if not is_distributed_env():
        yield ProcessGroup(torch.device(name))
        return
    found = argparse.Namespace(device=name)
    own_device = init_distributed_device(found)
    try:
        yield ProcessGroup(own_device, found.rank, found.world_size)
    finally:
        distributed.destroy_process_group()
