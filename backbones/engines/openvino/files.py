"""OpenVINO's intermediate representation: an ``.xml`` file of the graph, a ``.bin`` of weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.engines.formats import Conversion, Format, FormatConfig, register, summary
from backbones.engines.onnx import OnnxConfig, write_onnx
from backbones.engines.openvino.depthwise import widen_depthwise
from backbones.engines.openvino.passes import norms_on_rows, scales_into_weights
from backbones.engines.runners import Runner, existing
from backbones.errors import ExportError, UnsupportedError
from backbones.optional import optional_import

__all__ = ["OpenVinoConfig", "OpenVinoRunner", "computes_in", "to_openvino"]

# What the engine computes in. It would choose a lower precision itself where it were faster.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
NEEDS = {"bf16": "BF16", "fp16": "FP16"}  # the processor's capability, as OpenVINO calls it


@dataclass(frozen=True)
class OpenVinoConfig(FormatConfig):
    """OpenVINO by way of ONNX."""


def to_openvino(conversion: Conversion, config: OpenVinoConfig, path: Path) -> None:
    """Write ``<path>`` and, beside it, the weights as ``.bin``; metadata is ``rt_info/backbones``.

    In fp16 the weights are stored in half precision; what is computed in is said when the file is
    opened. In int8 NNCF quantizes weights and activations.

    Raises:
        MissingDependencyError: openvino, onnx or onnxscript is not installed; int8 needs nncf.
        ExportError: a converter failed.
    """
    ov = optional_import("openvino", "openvino")
    between = path.with_suffix(".onnx")
    # In int8 norms stay whole operations: NNCF would quantize the statistics of decomposed ones.
    write_onnx(conversion, OnnxConfig(), between, decompose=conversion.precision != "int8")
    try:
        model = ov.Core().read_model(str(between))
        if conversion.precision == "int8":
            from backbones.engines.int8 import quantize_openvino

            model = quantize_openvino(model, conversion)
        model.set_rt_info(json.dumps(conversion.metadata, allow_nan=False), "backbones")
        ov.save_model(model, str(path), compress_to_fp16=conversion.precision == "fp16")
    except RuntimeError as error:
        raise ExportError(f"{path.name}: OpenVINO cannot convert it: {summary(error)}") from error
    for file in path.parent.glob(f"{between.name}*"):
        file.unlink()


class OpenVinoRunner(Runner):
    """An OpenVINO file on the CPU.

    Args:
        path: the ``.xml`` file; the ``.bin`` file must lie beside it.
        threads: threads of one call; None for PyTorch's number.
        batch_size: number of images that calls mostly have, where the file leaves it free. The
            model compiled for it knows all shapes, is rewritten for the engine's fastest kernels,
            and is faster; calls with another number get one compiled of their own.
        precision: what to compute in; None for the precision that the file was written for, where
            this processor has it, else fp32.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        UnsupportedError: this processor does not compute in the precision asked for.
        ExportError: OpenVINO cannot load the file.
    """

    engine = "openvino"

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        threads: int | None = None,
        batch_size: int | None = None,
        precision: str | None = None,
    ) -> None:
        ov = optional_import("openvino", "openvino")
        self.path = existing(path)
        self._lock = threading.Lock()
        core = ov.Core()
        try:
            model = core.read_model(str(self.path))
            facts = (
                json.loads(model.get_rt_info("backbones").value)
                if model.has_rt_info("backbones")
                else {}
            )
            written = facts.get("precision", "fp32")
            if precision is None:
                precision = written if computes_in(written) else "fp32"
            elif not computes_in(precision):
                raise UnsupportedError(
                    f"this processor has no {precision} instructions, and OpenVINO would compute"
                    " in fp32; use precision='fp32' or 'int8'"
                )
            taken = model.inputs[0]
            shape = [d.get_length() if d.is_static else None for d in taken.get_partial_shape()]
            raw = taken.get_element_type() == ov.Type.u8
            options = {
                "INFERENCE_PRECISION_HINT": HINTS[precision],
                "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
            }
            place = str(self.path)
            self._compile = lambda: core.compile_model(core.read_model(place), "CPU", options)
            self._compiled: dict[int | None, Any] = {}  # by batch size
            size = batch_size if shape[0] is None else None
            if size is not None:
                dimensions = taken.get_partial_shape()
                dimensions[0] = size
                model.reshape(dimensions)
            self._channels_last: set[int | None] = set()  # those that take (B, H, W, C)
            if not model.is_dynamic():
                norms_on_rows(model)
                scales_into_weights(model)
                widen_depthwise(model, options)
                if not raw:
                    model = _taking_channels_last(model)
                    self._channels_last.add(size)
            self._compiled[size] = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            if isinstance(error, UnsupportedError):
                raise
            raise ExportError(f"{self.path}: OpenVINO cannot load it: {summary(error)}") from error
        super().__init__(self.path, shape, threads=threads, raw=raw, metadata=facts)
        self.precision = precision
        self._of_thread = threading.local()

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run this thread's own request: requests share the model, not the buffers."""
        size = len(x) if len(x) in self._compiled else None
        requests = self._of_thread.__dict__.setdefault("requests", {})
        if size not in requests:
            with self._lock:
                if size not in self._compiled:
                    self._compiled[size] = self._compile()
            request = self._compiled[size].create_infer_request()
            requests[size] = request, *(_views_of(request) if size in self._channels_last else ())
        request, *views = requests[size]
        # The buffers are the request's and are written again by its next call.
        if views:
            place, outputs = views
            _put_channels_last(x.numpy(), place)
            request.infer(share_outputs=True)
            return [torch.from_numpy(output.copy()) for output in outputs]
        results = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(results[i].copy()) for i in range(len(results))]


def _views_of(request: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the input's and the outputs' buffers of a request whose shapes are fixed.

    Asking for them anew costs small models two hundredths of their time.
    """
    count = len(request.model_outputs)
    outputs = [request.get_output_tensor(i).data for i in range(count)]
    return request.get_input_tensor().data, outputs


def _taking_channels_last(model: Any) -> Any:
    """Return an ``openvino.Model`` that takes images (B, H, W, C), as its convolutions read them.

    OpenVINO's own change of layout takes three to six times as long as `_put_channels_last`.
    """
    ov = optional_import("openvino", "openvino")
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    return steps.build()


def _put_channels_last(images: np.ndarray, place: np.ndarray) -> None:
    """Copy images (B, C, H, W) to a place (B, H, W, C), with the few channels one by one."""
    for channel in range(images.shape[1]):
        place[..., channel] = images[:, channel]


def computes_in(precision: str) -> bool:
    """Tell whether OpenVINO computes in a precision on this processor, rather than emulate it."""
    ov = optional_import("openvino", "openvino")
    needed = NEEDS.get(precision)
    return needed is None or needed in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


register(
    Format(
        "openvino",
        ".xml",
        OpenVinoConfig,
        to_openvino,
        OpenVinoRunner,
        ("fp32", "fp16", "int8"),
    )
)
