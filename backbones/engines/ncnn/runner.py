"""ncnn's runtime on the CPU."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.engines.formats import Format
from backbones.engines.ncnn.conversion import NcnnConfig, beside, to_ncnn
from backbones.engines.runners import (
    Deployment,
    Engine,
    FixedBatchRunner,
    Runner,
    existing,
    explained,
)
from backbones.errors import ExportError
from backbones.optional import optional_import

__all__ = ["ENGINE", "FORMAT", "NcnnRunner"]

# By default ncnn rounds to these where the processor has them, also files in float32.
_ROUNDING = "use_fp16_packed use_fp16_storage use_fp16_arithmetic use_bf16_storage".split()


class NcnnRunner(FixedBatchRunner):
    """A graph that `export` wrote, and its weights; calls of several threads take turns.

    It computes in float32, whatever the weights are stored in.

    Args:
        path: the ``.param`` file.
        threads: threads of one call; None for PyTorch's number.

    Raises:
        MissingDependencyError: ncnn is not installed.
        WeightsUnavailableError: one of the three files is not there (also a `FileNotFoundError`).
        ExportError: ncnn cannot load the files, or the description is not one of ours.
    """

    engine = "ncnn"

    def __init__(self, path: str | PathLike[str], *, threads: int | None = None) -> None:
        self._ncnn = optional_import("ncnn", "ncnn")
        self.path = existing(path)
        weights, facts = existing(beside(self.path, ".bin")), _facts(beside(self.path, ".json"))
        self._net = self._ncnn.Net()
        options = self._net.opt
        options.num_threads = threads or torch.get_num_threads()
        options.use_vulkan_compute = False
        for name in _ROUNDING:
            setattr(options, name, False)
        failed = self._net.load_param(str(self.path)) or self._net.load_model(str(weights))
        if failed:
            raise ExportError(f"{self.path}: ncnn cannot load it and {weights.name}")
        self._input, self._outputs = facts["blobs"]["input"], facts["blobs"]["outputs"]
        shape = [None if facts["free_batch"] else facts["batch"], *facts["input"]["input_size"]]
        super().__init__(self.path, shape, 1, threads=threads, metadata=facts)

    def run(self, x: Tensor) -> list[Tensor]:
        """Run one image, (1, C, H, W)."""
        image = x[0].numpy()
        with explained(f"{self.path}: ncnn failed"):
            extractor = self._net.create_extractor()
            extractor.input(self._input, self._ncnn.Mat(image).clone())  # aligned as ncnn likes
            found = []
            for name in self._outputs:
                status, output = extractor.extract(name)
                if status:
                    raise ExportError(f"{self.path}: ncnn cannot compute {name} ({status})")
                found.append(torch.from_numpy(np.array(output))[None])
        return found


def _facts(path: Path) -> dict[str, Any]:
    """Return what a description says."""
    with explained(f"{existing(path)}: no description of an ncnn file of this package"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        missing = {"blobs", "free_batch", "batch", "input"} - {*facts}
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return facts


def _start(deployment: Deployment) -> Runner:
    """Export to ncnn and run it."""
    precision = deployment.precision
    path = deployment.exported(f"{precision}.ncnn.param", precision)
    return NcnnRunner(path, threads=deployment.threads)


_PRECISIONS = ("fp32", "fp16")
FORMAT = Format(
    "ncnn",
    ".param",
    NcnnConfig,
    to_ncnn,
    NcnnRunner,
    _PRECISIONS,
    dynamic=("batch",),
    computes_half=False,
)
ENGINE = Engine("ncnn", _start, _PRECISIONS, ("ncnn", "pnnx"), extra="ncnn")
