"""ONNX: PyTorch's exporter in, ONNX Runtime out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines.formats import Format, OnnxConfig, register
from backbones.engines.optional import optional_import
from backbones.engines.runners import OnnxRuntimeRunner
from backbones.errors import ExportError, UnsupportedError

__all__ = ["to_onnx"]

AXES = {"batch": 0, "height": 2, "width": 3}
LARGEST = 2**31 - 2**20  # protobuf's limit for one file, with room for the graph itself


def to_onnx(
    model: nn.Module,
    example: Tensor,
    dynamic: Sequence[str],
    config: OnnxConfig,
    metadata: Mapping[str, Any],
    path: Path,
) -> None:
    """Write `model`, in eval mode on the CPU, as one ONNX file with input ``input``, output
    ``logits`` and the metadata property ``backbones`` (JSON).

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        UnsupportedError: the model exceeds the 2 GB of one file.
        ExportError: the exporter failed.
    """
    optional_import("onnx", "onnx")
    optional_import("onnxscript", "onnx")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST:
        raise UnsupportedError(f"{path}: {size} bytes of weights exceed the 2 GB of an ONNX file")
    shapes = {AXES[name]: torch.export.Dim(name) for name in dynamic}
    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=(shapes,) if shapes else None,
            input_names=["input"],
            output_names=["logits"],
            opset_version=config.opset,
            verbose=False,
        )
        assert program is not None  # it is None with the exporter of old only
        program.model.metadata_props["backbones"] = json.dumps(metadata, allow_nan=False)
        program.save(path, external_data=False)
    except Exception as error:  # whatever torch.export, the translation and protobuf raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ExportError(f"{path.name}: PyTorch's ONNX exporter failed: {reason}") from error


register(Format("onnx", OnnxConfig, to_onnx, OnnxRuntimeRunner))
