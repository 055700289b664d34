"""Running ExecuTorch programs."""

import json
import threading
from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from backbones.engines.executorch.sizes import Span
from backbones.engines.runners import Runner, existing, explained, filled
from backbones.errors import InputSizeError
from backbones.optional import optional_import

__all__ = ["ExecuTorchRunner"]

_SIDES = {"height": 2, "width": 3}  # of images (B, C, H, W)


class _Pool:
    """XNNPACK's threads: a process has one pool, and another number of them takes another pool.

    A program keeps hold of the pool that it was loaded with, and must not run after its end.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self._made = 0

    def of(self, threads: int) -> int:
        """Have so many threads, and return which of the pools so far it is."""
        name = "executorch.extension.pybindings.portable_lib"
        library = optional_import(name, "executorch")
        if library._threadpool_get_thread_count() != threads:
            library._unsafe_reset_threadpool(threads)
            self._made += 1
        return self._made


_POOL = _Pool()


class ExecuTorchRunner(Runner):
    """An ExecuTorch program that `export` wrote; calls take turns, also those of other programs.

    All programs of a process share their threads. Runners of different numbers of threads load
    their programs anew when they take over from each other. A program that was loaded without this
    package has to be loaded again after a runner had another number of threads, or it crashes.
    """

    engine = "executorch"

    def __init__(self, path: str | PathLike[str], *, threads: int | None = None) -> None:
        runtime = optional_import("executorch.runtime", "executorch")
        self.path = existing(path)
        with explained(
            f"{self.path}: cannot be loaded as an ExecuTorch program that this package wrote"
        ):
            # Not by its path: the file may be replaced before the program is loaded again.
            self._read = partial(runtime.Runtime.get().load_program, self.path.read_bytes())
            program = self._read()
            facts = json.loads(program.load_method("backbones").execute([])[0])
            taken = program.metadata("forward").input_tensor_meta(0).sizes()
        batch, *rest = facts["shape"]
        self.max_batch = int(taken[0])
        self._exact = facts.get("images") is not None
        self.spans = {name: Span(**span) for name, span in facts.get("free_sizes", {}).items()}
        shape = [None if facts["free_batch"] else batch, *rest]
        for name, span in self.spans.items():
            shape[_SIDES[name]] = str(span)
        raw = facts["preprocess"]
        super().__init__(self.path, shape, threads=threads, raw=raw, metadata=facts)
        self._program: Any = None
        self._pool = 0
        with explained(f"{self.path}: ExecuTorch cannot load it"), _POOL.turn:
            self._loaded()

    def other_sizes(self, height: int, width: int) -> Sequence[tuple[int, int]]:
        """Return the borders: the least height at the largest width, and the largest of both."""
        fixed = {"height": height, "width": width}
        most = {name: span.most for name, span in self.spans.items()}
        least = self.spans["height"].least if "height" in self.spans else height
        largest = {**fixed, **most}
        return [(least, largest["width"]), (largest["height"], largest["width"])]

    def _loaded(self) -> Any:
        """Return the program's method, which works with the threads that there are now."""
        pool = _POOL.of(self.threads)
        if self._program is None or pool != self._pool:
            self._program = None  # two of them would take twice the memory
            self._program, self._pool = self._read(), pool
        return self._program.load_method("forward")  # which a program keeps

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run the method, in parts where there are more images than it takes."""
        for name, span in self.spans.items():
            if x.shape[_SIDES[name]] not in span:
                raise InputSizeError(
                    f"{self.what} takes for {name} the {span}, got {tuple(x.shape)}; resize the"
                    " images, or export the model for others by input_size and max_size"
                )
        # The runtime takes the strides for those of a contiguous tensor, whatever they are.
        parts = [part.contiguous() for part in x.split(self.max_batch)]
        if self._exact:
            parts[-1] = filled(parts[-1], self.max_batch)
        with _POOL.turn:
            method = self._loaded()
            found = [[output.clone() for output in method.execute([part])] for part in parts]
        return [torch.cat(outputs)[: len(x)] for outputs in zip(*found)]
