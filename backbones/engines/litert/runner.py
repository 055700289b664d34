"""LiteRT's runtime: XNNPACK, and LiteRT's own kernels for what XNNPACK lacks."""

from os import PathLike

import torch
from torch import Tensor

from backbones.engines.litert.flatbuffers import INPUT, SIGNATURE, facts_of
from backbones.engines.runners import FixedBatchRunner, existing, explained, own_facts
from backbones.optional import optional_import

__all__ = ["LiteRtRunner"]


class LiteRtRunner(FixedBatchRunner):
    """A LiteRT file that `export` wrote; calls of several threads take turns.

    Args:
        path: the file.
        threads: threads of one call; None for PyTorch's number.

    Raises:
        MissingDependencyError: LiteRT is not installed.
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        ExportError: LiteRT cannot load the file, or another program wrote it.
    """

    engine = "litert"

    def __init__(self, path: str | PathLike[str], *, threads: int | None = None) -> None:
        litert = optional_import("ai_edge_litert.interpreter", "litert")
        self.path = existing(path)
        count = threads or torch.get_num_threads()
        with explained(f"{self.path}: LiteRT cannot load it"):
            # Not by its path: the file may be replaced while it is in use.
            content = self.path.read_bytes()
            self._interpreter = litert.Interpreter(model_content=content, num_threads=count)
            self._interpreter.allocate_tensors()
            facts = own_facts(facts_of(content), self.path)
        ends = self._interpreter.get_signature_runner(SIGNATURE)
        taken = ends.get_input_details()[INPUT]
        given = ends.get_output_details()
        self._input, self._outputs = taken["index"], [given[n]["index"] for n in facts["outputs"]]
        raw = facts["preprocess"]
        self._channels_last = facts["input_layout"] == "nhwc" and not raw
        images, *rest = (int(size) for size in taken["shape"])
        if self._channels_last:
            rest = [rest[2], *rest[:2]]
        shape = [None if facts["free_batch"] else images, *rest]
        super().__init__(self.path, shape, images, threads=count, raw=raw, metadata=facts)

    def run(self, x: Tensor) -> list[Tensor]:
        """Run the file once."""
        if self._channels_last:
            x = x.permute(0, 2, 3, 1)
        self._interpreter.set_tensor(self._input, x.contiguous().numpy())
        self._interpreter.invoke()
        return [torch.from_numpy(self._interpreter.get_tensor(n)) for n in self._outputs]
