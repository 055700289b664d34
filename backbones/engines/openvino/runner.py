"""Running OpenVINO's files on the CPU."""

import json
import threading
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.engines.openvino.depthwise import widen_depthwise
from backbones.engines.openvino.passes import norms_on_rows, scales_into_weights
from backbones.engines.preparation import PRECISIONS
from backbones.engines.runners import Deployment, Engine, Runner, existing
from backbones.errors import ExportError, UnsupportedError, first_line
from backbones.optional import optional_import

__all__ = ["ENGINE", "OpenVinoRunner", "computes_in"]

# What the engine computes in. It would choose a lower precision itself where it were faster.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
NEEDS = {"bf16": "BF16", "fp16": "FP16"}  # the processor's capability, as OpenVINO calls it


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
        self._core = ov.Core()
        model = self._read()
        has_facts = model.has_rt_info("backbones")
        facts = json.loads(model.get_rt_info("backbones").value) if has_facts else {}
        precision = _possible(precision, facts.get("precision", "fp32"))
        self._options = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        taken = model.inputs[0]
        shape = [d.get_length() if d.is_static else None for d in taken.get_partial_shape()]
        raw = taken.get_element_type() == ov.Type.u8
        size = batch_size if shape[0] is None else None
        # by batch size, None for any; and of them those that take (B, H, W, C)
        self._compiled: dict[int | None, Any] = {}
        self._channels_last: set[int | None] = set()
        self._compiled[size] = self._compile(self._fitted(model, size, raw))
        super().__init__(self.path, shape, threads=threads, raw=raw, metadata=facts)
        self.precision = precision
        self._lock = threading.Lock()
        self._of_thread = threading.local()

    def _read(self) -> Any:
        """Return the file's model."""
        try:
            return self._core.read_model(str(self.path))
        except RuntimeError as error:
            raise self._cannot_load(error) from error

    def _fitted(self, model: Any, size: int | None, raw: bool) -> Any:
        """Return the model for a batch size; rewritten where that makes all shapes known."""
        try:
            if size is not None:
                dimensions = model.inputs[0].get_partial_shape()
                dimensions[0] = size
                model.reshape(dimensions)
            if model.is_dynamic():
                return model
            norms_on_rows(model)
            scales_into_weights(model)
            widen_depthwise(model, self._options)
            if raw:
                return model
            self._channels_last.add(size)
            return _taking_channels_last(model)
        except RuntimeError as error:
            raise self._cannot_load(error) from error

    def _compile(self, model: Any) -> Any:
        try:
            return self._core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise self._cannot_load(error) from error

    def _cannot_load(self, error: RuntimeError) -> ExportError:
        return ExportError(f"{self.path}: OpenVINO cannot load it: {first_line(error)}")

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run this thread's own request: requests share the model, not the buffers."""
        size = len(x) if len(x) in self._compiled else None
        requests = self._of_thread.__dict__.setdefault("requests", {})
        if size not in requests:
            with self._lock:
                if size not in self._compiled:
                    self._compiled[size] = self._compile(self._read())
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


def _possible(asked: str | None, written: str) -> str:
    """Return the precision asked for, or else that of the file, if this processor has it."""
    if asked is None:
        return written if computes_in(written) else "fp32"
    if not computes_in(asked):
        raise UnsupportedError(
            f"this processor has no {asked} instructions, and OpenVINO would compute in fp32; use"
            " precision='fp32' or 'int8'"
        )
    return asked


def computes_in(precision: str) -> bool:
    """Tell whether OpenVINO computes in a precision on this processor, rather than emulate it."""
    ov = optional_import("openvino", "openvino")
    needed = NEEDS.get(precision)
    return needed is None or needed in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _start(deployment: Deployment) -> Runner:
    """Export to OpenVINO's format and run it."""
    _possible(deployment.precision, "fp32")
    # bf16 and fp16 are what is computed in; the weights stay whole in the file.
    written = deployment.precision if deployment.precision == "int8" else "fp32"
    return OpenVinoRunner(
        deployment.exported(f"{written}.xml", written),
        threads=deployment.threads,
        batch_size=deployment.batch_size,
        precision=deployment.precision,
    )


ENGINE = Engine(
    "openvino", _start, PRECISIONS, ("openvino", "onnx", "onnxscript"), extra="openvino"
)
