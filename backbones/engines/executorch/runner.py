"""Running ExecuTorch programs, and what the format and the engine are."""

import json
import threading
from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor

from backbones.engines.executorch.lowering import ExecuTorchConfig, to_executorch
from backbones.engines.formats import Format
from backbones.engines.runners import Deployment, Engine, Runner, existing, explained
from backbones.optional import optional_import

__all__ = ["ENGINE", "FORMAT"]


class _ExecuTorchRunner(Runner):
    """An ExecuTorch program that `export` wrote; calls of several threads take turns.

    Its threads are XNNPACK's own, one for each core; `threads` cannot set their number.
    """

    engine = "executorch"

    def __init__(self, path: str | PathLike[str], *, threads: int | None = None) -> None:
        runtime = optional_import("executorch.runtime", "executorch")
        self.path = existing(path)
        with explained(
            f"{self.path}: cannot be loaded as an ExecuTorch program that this package wrote"
        ):
            self._program = runtime.Runtime.get().load_program(str(self.path))
            facts = json.loads(self._program.load_method("backbones").execute([])[0])
            self._method = self._program.load_method("forward")
        batch, *rest = facts["shape"]
        self.max_batch = int(self._method.metadata.input_tensor_meta(0).sizes()[0])
        shape = [None if facts["free_batch"] else batch, *rest]
        raw = facts["preprocess"]
        super().__init__(self.path, shape, threads=threads, raw=raw, metadata=facts)
        self._turn = threading.Lock()

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run the method, in parts where there are more images than memory was planned for."""
        with self._turn:
            # The runtime takes the strides for those of a contiguous tensor, whatever they are.
            parts = [
                [output.clone() for output in self._method.execute([part.contiguous()])]
                for part in x.split(self.max_batch)
            ]
        return [torch.cat(outputs) for outputs in zip(*parts)]


def _start(deployment: Deployment) -> Runner:
    """Export to ExecuTorch and run it, on as many threads as the machine has cores."""
    batch = deployment.batch_size
    config = ExecuTorchConfig(max_batch=max(2, batch))
    path = deployment.exported(f"{deployment.precision}-{batch}.pte", deployment.precision, config)
    return _ExecuTorchRunner(path, threads=deployment.threads)


_PRECISIONS = ("fp32", "int8")
FORMAT = Format(
    "executorch",
    ".pte",
    ExecuTorchConfig,
    to_executorch,
    _ExecuTorchRunner,
    _PRECISIONS,
    dynamic=("batch",),
)
ENGINE = Engine("executorch", _start, _PRECISIONS, ("executorch",), extra="executorch")
