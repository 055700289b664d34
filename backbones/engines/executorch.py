"""ExecuTorch with XNNPACK, for phones and small boards."""

import dataclasses
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from backbones.engines.formats import Conversion, Format, FormatConfig, Notes, traced
from backbones.engines.runners import Deployment, Engine, Runner, existing, explained
from backbones.optional import optional_import

__all__ = ["ENGINE", "FORMAT", "ExecuTorchConfig"]


@dataclass(frozen=True)
class ExecuTorchConfig(FormatConfig):
    """ExecuTorch; memory is planned for batches of up to `max_batch` images."""

    max_batch: int = 8


def _to_executorch(conversion: Conversion, config: ExecuTorchConfig, path: Path) -> Notes:
    """Write the program, what XNNPACK knows delegated to it; metadata is the method ``backbones``.

    Returns how many operations XNNPACK runs, and how many the portable (slow) kernels.
    """
    exir = optional_import("executorch.exir", "executorch")
    passes = optional_import("executorch.exir.passes.sym_shape_eval_pass", "executorch")
    xnnpack = optional_import(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch"
    )
    debug = optional_import("executorch.devtools.backend_debug", "executorch")
    free = "batch" in conversion.dynamic
    batch = config.max_batch if free else conversion.example.shape[0]
    shape = [batch, *conversion.example.shape[1:]]
    facts = {**conversion.metadata, "shape": shape, "free_batch": free}
    # Where lowering loses the bound of a size, memory is planned for the example's.
    largest = conversion.example[:1].expand(*shape).contiguous()
    program = traced(dataclasses.replace(conversion, example=largest), {"batch": config.max_batch})
    with explained(f"{path.name}: ExecuTorch cannot lower it", OSError):
        lowered = exir.to_edge_transform_and_lower(
            program,
            partitioner=[xnnpack.XnnpackPartitioner()],
            constant_methods={"backbones": json.dumps(facts, allow_nan=False)},
        )
        found = debug.get_delegation_info(lowered.exported_program().graph_module)
        plan = exir.ExecutorchBackendConfig(
            sym_shape_eval_pass=passes.ConstraintBasedSymShapeEvalPass()
        )
        with path.open("wb") as stream:
            lowered.to_executorch(plan).write_to_file(stream)
    delegated, others = found.num_delegated_nodes, found.num_non_delegated_nodes
    return {
        "delegated_operations": delegated,
        "other_operations": others,
        "delegated_share": delegated / (delegated + others),
    }


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


FORMAT = Format(
    "executorch", ".pte", ExecuTorchConfig, _to_executorch, _ExecuTorchRunner, dynamic=("batch",)
)
ENGINE = Engine("executorch", _start, ("fp32",), ("executorch",), extra="executorch")
