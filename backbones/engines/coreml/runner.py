"""Core ML's own engine, which is a part of macOS."""

import sys
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.engines.coreml.checking import read_package
from backbones.engines.coreml.conversion import CoreMlConfig, to_coreml
from backbones.engines.coreml.facts import INPUT, facts_of
from backbones.engines.coreml.tools import quiet_tools
from backbones.engines.formats import Format
from backbones.engines.runners import FixedBatchRunner, explained, own_facts
from backbones.errors import UnsupportedError, WeightsUnavailableError
from backbones.optional import optional_import

__all__ = ["FORMAT", "RUNS_HERE", "CoreMlRunner"]

RUNS_HERE = sys.platform == "darwin"


class CoreMlRunner(FixedBatchRunner):
    """A Core ML package that `export` wrote, on macOS; calls of several threads take turns.

    It gives the logits or maps; a classifier's label and probabilities are for apps.

    Args:
        path: the package.
        threads: of no effect: Core ML chooses units and threads.

    Raises:
        UnsupportedError: the system is not macOS.
        MissingDependencyError: coremltools is not installed.
        WeightsUnavailableError: there is no such package (also a `FileNotFoundError`).
        ExportError: Core ML cannot load the package, or another program wrote it.
    """

    engine = "coreml"

    def __init__(self, path: str | PathLike[str], *, threads: int | None = None) -> None:
        if not RUNS_HERE:
            raise UnsupportedError(
                f"{path}: Core ML files run on macOS only; open it there, or export the model to"
                " another format for this system"
            )
        self.path = Path(path)
        if not self.path.is_dir():
            raise WeightsUnavailableError(f"{self.path}: no such package; export the model first")
        with quiet_tools() as tools, explained(f"{self.path}: Core ML cannot load it"):
            self._model = tools.models.MLModel(str(self.path))
            description = self._model.get_spec().description
        facts = own_facts(facts_of(description), self.path)
        channels, height, width = facts["input"]["input_size"]
        raw, images, self._outputs = facts["preprocess"], facts["images"], facts["outputs"]
        size = (height, width, channels) if raw else (channels, height, width)
        shape = [None if facts["free_batch"] else images, *size]
        super().__init__(self.path, shape, images, threads=threads, raw=raw, metadata=facts)

    def run(self, x: Tensor) -> list[Tensor]:
        """Run the package once."""
        found = self._model.predict({INPUT: _picture(x[0]) if self.raw else x.numpy()})
        return [torch.from_numpy(np.asarray(found[name], np.float32)) for name in self._outputs]


def _picture(image: Tensor) -> Any:
    """Return an image (H, W, C) of 1 or 3 channels as Core ML takes it."""
    pixels = image.numpy()
    return optional_import("PIL.Image", "coreml").fromarray(
        pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    )


FORMAT = Format(
    "coreml",
    ".mlpackage",
    CoreMlConfig,
    to_coreml,
    CoreMlRunner,
    ("fp16", "fp32"),
    dynamic=("batch",),
    folder=True,
    computes_half=False,
    read_back=None if RUNS_HERE else read_package,
)
