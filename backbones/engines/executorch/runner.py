"""Running ExecuTorch programs."""

import json
import threading
from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor

from backbones.engines.executorch.sizes import Span
from backbones.engines.runners import Runner, existing, explained
from backbones.errors import InputSizeError
from backbones.optional import optional_import

__all__ = ["ExecuTorchRunner"]

_SIDES = {"height": 2, "width": 3}  # of images (B, C, H, W)


class ExecuTorchRunner(Runner):
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
        self.spans = {name: Span(**span) for name, span in facts.get("free_sizes", {}).items()}
        shape = [None if facts["free_batch"] else batch, *rest]
        for name, span in self.spans.items():
            shape[_SIDES[name]] = str(span)
        raw = facts["preprocess"]
        super().__init__(self.path, shape, threads=threads, raw=raw, metadata=facts)
        self._turn = threading.Lock()

    def other_sizes(self, height: int, width: int) -> Sequence[tuple[int, int]]:
        """Return the borders: the least height at the largest width, and the largest of both."""
        fixed = {"height": height, "width": width}
        most = {name: span.most for name, span in self.spans.items()}
        least = self.spans["height"].least if "height" in self.spans else height
        largest = {**fixed, **most}
        return [(least, largest["width"]), (largest["height"], largest["width"])]

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run the method, in parts where there are more images than memory was planned for."""
        for name, span in self.spans.items():
            if x.shape[_SIDES[name]] not in span:
                raise InputSizeError(
                    f"{self.what} takes for {name} the {span}, got {tuple(x.shape)}; resize the"
                    " images, or export the model for others by input_size and max_size"
                )
        with self._turn:
            # The runtime takes the strides for those of a contiguous tensor, whatever they are.
            parts = [
                [output.clone() for output in self._method.execute([part.contiguous()])]
                for part in x.split(self.max_batch)
            ]
        return [torch.cat(outputs) for outputs in zip(*parts)]
