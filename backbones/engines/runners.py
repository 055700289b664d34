"""Runners: an exported file as a callable, images in, logits out."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Union

import numpy as np
import torch
from torch import Tensor

from backbones.engines.optional import optional_import
from backbones.errors import ExportError, InputSizeError, WeightsUnavailableError

__all__ = ["OnnxRuntimeRunner", "Runner"]


class Runner(Protocol):
    """What every engine offers."""

    engine: str
    threads: int

    @property
    def metadata(self) -> dict[str, Any]:
        """What `export` wrote into the file: name, license, classes, input, ...; else empty."""
        ...

    def __call__(self, x: Union[Tensor, np.ndarray]) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes) on the CPU."""
        ...


class OnnxRuntimeRunner:
    """An ONNX file in ONNX Runtime's CPU engine; may be called from several threads.

    Args:
        path: the file.
        threads: threads of one call; None for PyTorch's number.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        ExportError: ONNX Runtime cannot load the file.
    """

    engine = "onnxruntime"

    def __init__(self, path: str | PathLike[str], *, threads: int | None = None) -> None:
        ort = optional_import("onnxruntime", "onnx")
        self.path = Path(path)
        if not self.path.is_file():
            raise WeightsUnavailableError(f"{self.path}: no such file; export the model first")
        self.threads = threads or torch.get_num_threads()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Idle threads that spin would take the cores from whatever runs between two calls.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = ort.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common public class
            raise ExportError(f"{self.path}: ONNX Runtime cannot load it: {error}") from error
        self._input = self._session.get_inputs()[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """What `export` wrote into the file: name, license, classes, input, ...; else empty."""
        found = self._session.get_modelmeta().custom_metadata_map.get("backbones")
        return json.loads(found) if found else {}

    def __call__(self, x: Tensor | np.ndarray) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes).

        Raises:
            InputSizeError: a shape that the file does not take.
        """
        array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
        expected = self._input.shape
        if len(array.shape) != len(expected) or any(
            isinstance(size, int) and size != given for size, given in zip(expected, array.shape)
        ):
            raise InputSizeError(
                f"{self.path} takes inputs of shape {tuple(expected)}, got {tuple(array.shape)}"
            )
        array = np.ascontiguousarray(array, dtype=np.float32)
        (output,) = self._session.run(None, {self._input.name: array})
        return torch.from_numpy(output)
