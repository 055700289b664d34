"""The engines: how a merged model starts in each, in which precisions."""

from __future__ import annotations

import copy
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines.exporting import export, random_input
from backbones.engines.formats import summary
from backbones.engines.onnx import OnnxRuntimeRunner
from backbones.engines.openvino.files import OpenVinoRunner, computes_in
from backbones.engines.preparation import DTYPES, InPrecision
from backbones.engines.pytorch.layouts import choose_layout
from backbones.engines.runners import Runner
from backbones.engines.threads import torch_threads
from backbones.errors import ExportError, UnsupportedError, nearest

__all__ = ["ENGINES", "Engine", "Job", "available_engines", "find_engine", "start"]


@dataclass(frozen=True)
class Job:
    """What an engine starts: a merged model in eval mode on the CPU, and for which inputs.

    `folder` is where files are kept, those of an earlier time included; `images` are real ones,
    normalized (N, C, H, W).
    """

    model: nn.Module
    size: tuple[int, ...]
    batch_size: int
    precision: str
    threads: int
    folder: Path
    images: Tensor | None = None


@dataclass(frozen=True)
class Engine:
    """An engine: the packages it needs, what it computes in, and how it starts a job."""

    name: str
    start: Callable[[Job], Runner]
    precisions: tuple[str, ...]
    packages: tuple[str, ...] = field(default=())
    extra: str = ""

    @property
    def installed(self) -> bool:
        """Whether the packages are there; they are not imported for it."""
        return all(importlib.util.find_spec(name) is not None for name in self.packages)


class _ModuleRunner(Runner):
    """A PyTorch module, eager or compiled; calls of several threads take turns."""

    def __init__(self, engine: str, module: Callable[[Tensor], Any], job: Job, layout: str) -> None:
        super().__init__(
            f"the model in engine {engine!r}", (None, job.size[0], None, None), threads=job.threads
        )
        self.engine, self.precision, self.layout = engine, job.precision, layout
        self._module = module
        self._last = layout.startswith("channels_last")
        self._turn = threading.Lock()

    def infer(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        """Run the module."""
        if self._last:
            x = x.contiguous(memory_format=torch.channels_last)
        # The number of threads is the process's.
        with self._turn, torch_threads(self.threads):
            return self._module(x)


def _start_eager(job: Job) -> Runner:
    """Run the module in the memory layout that is fastest here."""
    module, layout = _laid_out(job)
    return _ModuleRunner("eager", module, job, layout)


def _start_compiled(job: Job) -> Runner:
    """Compile the module with its weights frozen in; the first call takes minutes."""
    module, layout = _laid_out(job)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, options={"freezing": True})
    runner = _ModuleRunner("compile", compiled, job, layout)
    try:
        runner(random_input((job.batch_size, *job.size)))
    except Exception as error:  # whatever the compiler's many stages raise
        raise ExportError(f"torch.compile failed: {summary(error)}") from error
    return runner


def _laid_out(job: Job) -> tuple[nn.Module, str]:
    module = copy.deepcopy(job.model)
    if job.precision in DTYPES:
        module = InPrecision(module, job.precision)
    with torch_threads(job.threads):
        return choose_layout(module.eval(), random_input((job.batch_size, *job.size)))


def _start_onnxruntime(job: Job) -> Runner:
    """Export to ONNX and run it in ONNX Runtime."""
    path = job.folder / f"{job.precision}.onnx"
    _export_once(job, path, job.precision)
    return OnnxRuntimeRunner(path, threads=job.threads, batch_size=job.batch_size)


def _start_openvino(job: Job) -> Runner:
    """Export to OpenVINO's format and run it."""
    if not computes_in(job.precision):
        raise UnsupportedError(
            f"this processor has no {job.precision} instructions: OpenVINO would compute in fp32"
        )
    # bf16 and fp16 are what is computed in; the weights stay whole in the file.
    written = job.precision if job.precision == "int8" else "fp32"
    path = job.folder / f"{written}.xml"
    _export_once(job, path, written)
    return OpenVinoRunner(
        path, threads=job.threads, batch_size=job.batch_size, precision=job.precision
    )


def _start_executorch(job: Job) -> Runner:
    """Export to ExecuTorch and run it, on as many threads as the machine has cores."""
    from backbones.engines.executorch import ExecuTorchConfig, ExecuTorchRunner

    path = job.folder / f"{job.precision}-{job.batch_size}.pte"
    _export_once(job, path, job.precision, ExecuTorchConfig(max_batch=max(2, job.batch_size)))
    return ExecuTorchRunner(path, threads=job.threads)


def _export_once(job: Job, path: Path, precision: str, format: Any = None) -> None:
    if not path.exists():
        images = job.images if precision == "int8" else None
        export(
            job.model,
            path,
            format=format,
            input_size=job.size,
            precision=precision,
            merge=False,  # it is merged
            calibration=images,
        )


ENGINES = {
    engine.name: engine
    for engine in (
        # Those that start soonest come first: `auto` has only so much time.
        Engine(
            "onnxruntime",
            _start_onnxruntime,
            ("fp32", "fp16", "int8"),
            ("onnx", "onnxscript", "onnxruntime"),
            "onnx",
        ),
        Engine(
            "openvino",
            _start_openvino,
            ("fp32", "bf16", "fp16", "int8"),
            ("openvino", "onnx", "onnxscript"),
            "openvino",
        ),
        Engine("eager", _start_eager, ("fp32", "bf16", "fp16")),
        Engine("executorch", _start_executorch, ("fp32",), ("executorch",), "executorch"),
        Engine("compile", _start_compiled, ("fp32", "bf16", "fp16")),
    )
}


def available_engines() -> list[str]:
    """Return the names of the engines whose packages are installed."""
    return [engine.name for engine in ENGINES.values() if engine.installed]


def find_engine(name: str) -> Engine:
    """Return an engine by name.

    Raises:
        UnsupportedError: there is no such engine.
    """
    if name not in ENGINES:
        raise UnsupportedError(
            f"no engine {name!r}{nearest(name, ENGINES)}; there are {', '.join(ENGINES)}"
        )
    return ENGINES[name]


def start(engine: Engine, job: Job) -> Runner:
    """Start a job in an engine.

    Raises:
        UnsupportedError: the engine does not compute in the job's precision.
        MissingDependencyError: a package is missing.
        ExportError: the model cannot be converted, or does not compute the same there.
    """
    if job.precision not in engine.precisions:
        raise UnsupportedError(
            f"engine {engine.name!r} has no precision {job.precision!r}; it has"
            f" {', '.join(engine.precisions)}"
        )
    return engine.start(job)
