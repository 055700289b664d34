"""Static int8: weights a channel, activations a tensor, ranges from real images.

ONNX Runtime's own quantizer writes ONNX files, NNCF writes OpenVINO's; each places its operations
where its engine can fuse them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from backbones.engines.formats import Conversion
from backbones.errors import ConfigError
from backbones.optional import optional_import

__all__ = ["quantize_onnx", "quantize_openvino"]

BATCH = 8
QUANTIZED = ("Conv", "Gemm", "MatMul")  # norms, spectra and pooled statistics stay in float32


class _Batches:
    """Calibration images, a batch at a time, as ONNX Runtime's quantizer reads them."""

    def __init__(self, conversion: Conversion) -> None:
        self._left = _batches(conversion)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch by input name; None at the end."""
        batch = next(self._left, None)
        return None if batch is None else {"input": batch}


def _batches(conversion: Conversion) -> Iterator[np.ndarray]:
    """Yield the calibration images in batches that the file takes.

    Raises:
        ConfigError: there are none.
    """
    if conversion.calibration is None:
        raise ConfigError("int8 needs images to calibrate on (calibration=FOLDER or a tensor)")
    size = BATCH if "batch" in conversion.dynamic else conversion.example.shape[0]
    for part in conversion.calibration.split(size):
        if len(part) == size:
            yield part.contiguous().numpy()


def quantize_onnx(source: Path, path: Path, conversion: Conversion) -> None:
    """Write the int8 form (QuantizeLinear and DequantizeLinear) of an ONNX file.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ConfigError: there are no calibration images.
    """
    tools = optional_import("onnxruntime.quantization", "onnx")
    prepared = source.with_name(f"prepared-{source.name}")
    reader = _Batches(conversion)
    shaped = optional_import("onnxruntime.quantization.shape_inference", "onnx")
    shaped.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    tools.quantize_static(
        str(prepared),
        str(path),
        reader,
        quant_format=tools.QuantFormat.QDQ,
        op_types_to_quantize=list(QUANTIZED),
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        calibrate_method=tools.CalibrationMethod.MinMax,
        # 8 bits in the weights would overflow the 16-bit sums of processors without VNNI.
        reduce_range=not _has_vnni(),
    )
    prepared.unlink()


def quantize_openvino(model: Any, conversion: Conversion) -> Any:
    """Return the int8 form of an OpenVINO model.

    Raises:
        MissingDependencyError: nncf is not installed.
        ConfigError: there are no calibration images.
    """
    nncf = optional_import("nncf", "openvino")
    nncf.set_log_level(logging.ERROR)
    given = list(_batches(conversion))
    return nncf.quantize(
        model,
        nncf.Dataset(given),
        subset_size=len(given),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(
            types=["MVN", "ReduceMean", "Multiply", "Add", "Power", "Divide"], validate=False
        ),
    )


def _has_vnni() -> bool:
    """Tell whether the processor sums products of 8-bit numbers in 32 bits."""
    flags = Path("/proc/cpuinfo")
    if not flags.is_file():
        return False
    text = flags.read_text(encoding="utf-8", errors="replace")
    return any(flag in text for flag in ("avx512_vnni", "avx_vnni", "asimddp", "i8mm"))
