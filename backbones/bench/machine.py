"""The machine that figures were measured on, and what its processor can do at most."""

import os
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backbones.bench.child import WORKER, Child
from backbones.engines import processor, versions

__all__ = ["Machine", "examine", "matmul_peak", "n_threads", "peak_memory_mib", "usable_cpus"]

LIBRARIES = (
    "backbones",
    "torch",
    "timm",
    "onnxruntime",
    "openvino",
    "executorch",
    "ai-edge-litert",
    "ncnn",
)
SIDES = (512, 1024, 2048)
LONGEST_S = 0.5  # a product that would take longer is not tried: the smaller one is large enough
GRANTED = 0.8  # of the threads asked for, below which the machine is said not to have granted them


@dataclass(frozen=True)
class Machine:
    """Where figures come from.

    `cpus` are those that the process may run on. `matmul_gmacs` is the measured peak of matrix
    products by type, in thousand million multiply-adds a second, at `threads` threads; while it was
    measured, `matmul_cores` processors were at work on average.
    """

    processor: str
    system: str
    cpus: int
    threads: int
    matmul_gmacs: dict[str, float]
    matmul_cores: float
    versions: dict[str, str]

    @property
    def problems(self) -> list[str]:
        """What is wrong with the threads, as sentences."""
        if self.threads > self.cpus:
            return [f"asked for {self.threads} threads, but only {self.cpus} CPUs may be used"]
        if self.matmul_cores < GRANTED * self.threads:
            return [
                f"matrix products on {n_threads(self.threads)} got the time of only"
                f" {self.matmul_cores:.1f} processors: other programs run, or a limit is set"
            ]
        return []

    def __str__(self) -> str:
        peak = ", ".join(f"{value:.0f} ({kind})" for kind, value in self.matmul_gmacs.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.processor}, {n_threads(self.threads)} on {self.cpus} CPUs; matrix products"
            f" reach {peak} GMAC/s; {self.system}, {versions}"
        )


def n_threads(threads: int) -> str:
    """Return the number with its noun."""
    return f"{threads} thread{'' if threads == 1 else 's'}"


def examine(
    threads: int,
    kinds: Sequence[str] = ("fp32",),
    *,
    limit_s: float = 600.0,
    command: Sequence[str] = WORKER,
) -> Machine:
    """Describe this machine and measure its matrix products, in a process of their own.

    Args:
        threads: threads of the products.
        kinds: their types: ``fp32``, ``bf16``, ``fp16``.
        limit_s: seconds after which the process is ended.
        command: what runs the products.

    Raises:
        ChildError: the process ended or took longer.
    """
    with Child("matrix products", threads=threads, limit_s=limit_s, command=command) as child:
        found = child.request({"do": "matmul", "threads": threads, "kinds": list(kinds)})
        child.request({"do": "end"})
        child.leave()
    return Machine(
        processor=processor(),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        cpus=usable_cpus(),
        threads=threads,
        matmul_gmacs=found["gmacs"],
        matmul_cores=found["cores"],
        versions=versions(LIBRARIES),
    )


def matmul_peak(kinds: Sequence[str], seconds: float = 0.4) -> dict[str, Any]:
    """Return the best rate of square products by type, and how many processors were at work.

    Kinds are ``fp32`` and ``bf16``; each size of each takes `seconds`, and three products at least.
    """
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    gmacs, cores = {}, 0.0
    for kind in kinds:
        best = 0.0
        for side in SIDES:
            work = side**3 / 1e9
            if best and work / best > LONGEST_S:
                break
            a = torch.randn(side, side).to(types[kind])
            b = torch.randn(side, side).to(types[kind])
            torch.mm(a, b)
            start, busy, runs = time.perf_counter(), time.process_time(), 0
            while runs < 3 or time.perf_counter() - start < seconds:
                before = time.perf_counter()
                torch.mm(a, b)
                best = max(best, work / (time.perf_counter() - before))
                runs += 1
            used = (time.process_time() - busy) / (time.perf_counter() - start)
            cores = max(cores, used)
        gmacs[kind] = best
    return {"gmacs": gmacs, "cores": cores}


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_mib() -> float | None:
    """Return the most memory that this process ever held, in MiB; None where unknown.

    Not `ru_maxrss` where Linux tells better: that one begins with the parent's memory.
    """
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return int(found[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 1024)
