"""PyTorch's modules as engines, eager or compiled, in the memory layout that is fastest here."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines.preparation import DTYPES, HALVES, InPrecision
from backbones.engines.pytorch.layouts import choose_layout
from backbones.engines.runners import Deployment, Engine, Runner, explained
from backbones.engines.timing import torch_threads

__all__ = ["COMPILE", "EAGER"]


class _ModuleRunner(Runner):
    """A PyTorch module, eager or compiled; calls of several threads take turns."""

    def __init__(
        self, engine: str, module: Callable[[Tensor], Any], deployment: Deployment, layout: str
    ) -> None:
        shape = (None, deployment.size[0], None, None)
        super().__init__(f"the model in engine {engine!r}", shape, threads=deployment.threads)
        self.engine, self.precision, self.layout = engine, deployment.precision, layout
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


def _start_eager(deployment: Deployment) -> Runner:
    """Run the module as it is."""
    module, layout = _laid_out(deployment)
    return _ModuleRunner("eager", module, deployment, layout)


def _start_compiled(deployment: Deployment) -> Runner:
    """Compile the module with its weights frozen in; the first call takes minutes."""
    module, layout = _laid_out(deployment)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, options={"freezing": True})
    runner = _ModuleRunner("compile", compiled, deployment, layout)
    with explained("torch.compile failed"):
        runner(deployment.example)
    return runner


def _laid_out(deployment: Deployment) -> tuple[nn.Module, str]:
    """Return a copy of the model in its precision and fastest layout, and the layout's name."""
    module = copy.deepcopy(deployment.model)
    if deployment.precision in HALVES:
        module = InPrecision(module, deployment.precision)
    with torch_threads(deployment.threads):
        return choose_layout(module.eval(), deployment.example)


EAGER = Engine("eager", _start_eager, tuple(DTYPES))
COMPILE = Engine("compile", _start_compiled, tuple(DTYPES), slow=True)
