"""OpenVINO's intermediate representation: an ``.xml`` file of the graph, a ``.bin`` of weights."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones.engines.formats import Conversion, Format, FormatConfig
from backbones.engines.onnx import OnnxConfig, write_onnx
from backbones.engines.openvino.runner import OpenVinoRunner
from backbones.errors import ExportError, first_line
from backbones.optional import optional_import

__all__ = ["FORMAT", "OpenVinoConfig"]


@dataclass(frozen=True)
class OpenVinoConfig(FormatConfig):
    """OpenVINO by way of ONNX."""


def _to_openvino(conversion: Conversion, config: OpenVinoConfig, path: Path) -> None:
    """Write ``<path>`` and, beside it, the weights as ``.bin``; metadata is ``rt_info/backbones``.

    In fp16 the weights are stored in half precision; what is computed in is said when the file is
    opened. In int8 NNCF quantizes weights and activations.
    """
    ov = optional_import("openvino", "openvino")
    between = path.with_suffix(".onnx")
    # In int8 norms stay whole operations: NNCF would quantize the statistics of decomposed ones.
    write_onnx(conversion, OnnxConfig(), between, decompose=conversion.precision != "int8")
    try:
        model = ov.Core().read_model(str(between))
        if conversion.precision == "int8":
            model = _quantized(model, conversion)
        model.set_rt_info(json.dumps(conversion.metadata, allow_nan=False), "backbones")
        ov.save_model(model, str(path), compress_to_fp16=conversion.precision == "fp16")
    except RuntimeError as error:
        message = f"{path.name}: OpenVINO cannot convert it: {first_line(error)}"
        raise ExportError(message) from error
    for file in path.parent.glob(f"{between.name}*"):
        file.unlink()


def _quantized(model: Any, conversion: Conversion) -> Any:
    """Return the int8 form of an OpenVINO model."""
    nncf = optional_import("nncf", "openvino")
    nncf.set_log_level(logging.ERROR)
    given = list(conversion.calibration_batches())
    return nncf.quantize(
        model,
        nncf.Dataset(given),
        subset_size=len(given),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(
            types=["MVN", "ReduceMean", "Multiply", "Add", "Power", "Divide"], validate=False
        ),
    )


FORMAT = Format(
    "openvino", ".xml", OpenVinoConfig, _to_openvino, OpenVinoRunner, ("fp32", "fp16", "int8")
)
