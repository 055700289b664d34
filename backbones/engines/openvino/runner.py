"""OpenVINO: a graph (``.xml``) and its weights (``.bin``), and running them on the CPU."""

import json
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.engines.formats import Conversion, Format, FormatConfig, Notes
from backbones.engines.onnx import OnnxConfig, write_onnx
from backbones.engines.openvino.mixing import rest_for
from backbones.engines.openvino.passes import (
    norms_on_rows,
    scales_into_weights,
    single_outputs_by_lanes,
    widen_depthwise,
)
from backbones.engines.openvino.quantization import Quantizer
from backbones.engines.preparation import PRECISIONS
from backbones.engines.quantization import to_target
from backbones.engines.runners import Deployment, Engine, Runner, existing, explained
from backbones.errors import UnsupportedError
from backbones.optional import optional_import

__all__ = ["ENGINE", "FORMAT", "OpenVinoConfig", "OpenVinoRunner", "computes_in"]

# What the engine computes in. It would choose a lower precision itself where it were faster.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
NEEDS = {"bf16": "BF16", "fp16": "FP16"}  # the processor's capability, as OpenVINO calls it


@dataclass(frozen=True)
class OpenVinoConfig(FormatConfig):
    """OpenVINO by way of ONNX."""


def _to_openvino(conversion: Conversion, config: OpenVinoConfig, path: Path) -> Notes:
    """Write ``<path>`` and, beside it, the weights as ``.bin``; metadata is ``rt_info/backbones``.

    In fp16 the weights are stored in half precision; what is computed in is said when the file is
    opened. In int8 NNCF quantizes weights and activations.
    """
    ov = optional_import("openvino", "openvino")
    # In int8 norms stay whole operations: the errors of decomposed ones are three times as large.
    rounded = conversion.precision == "int8"
    before, inner = conversion.parts() if rounded and conversion.raw else (None, conversion)
    with TemporaryDirectory(dir=path.parent) as folder:
        between = Path(folder, path.with_suffix(".onnx").name)
        first = Path(folder, f"preprocessing of {between.name}")
        program = write_onnx(inner, OnnxConfig(), between, decompose=not rounded)
        if before is not None:
            write_onnx(before, OnnxConfig(), first)
        notes: Notes = {}
        with explained(f"{path.name}: OpenVINO cannot convert it"):
            model = ov.Core().read_model(str(between))
            if rounded:
                small = Path(folder, f"int8 of {path.name}")
                quantizer = Quantizer(model, inner, program)
                notes = to_target(
                    inner,
                    program,
                    lambda plan: ov.save_model(quantizer.quantized(plan), str(small), False),
                    lambda: OpenVinoRunner(small),
                )
                model = ov.Core().read_model(str(small))
            if before is not None:
                model = _joined(ov.Core().read_model(str(first)), model)
            model.set_rt_info(json.dumps(conversion.metadata, allow_nan=False), "backbones")
            ov.save_model(model, str(path), compress_to_fp16=conversion.precision == "fp16")
            del model  # some systems do not remove a file that is open
    return notes


def _joined(first: Any, second: Any) -> Any:
    """Return one ``openvino.Model`` of two: the output of the first is the input of the second."""
    ov = optional_import("openvino", "openvino")
    (given,), (taken,) = first.get_results(), second.get_parameters()
    taken.output(0).replace(given.input_value(0))
    return ov.Model(second.get_results(), first.get_parameters(), second.get_friendly_name())


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
        streams: calls that are computed side by side, each by `threads`.
        rest: what an int8 file computes in outside its int8 layers: ``fp32`` or ``bf16``.

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
        streams: int = 1,
        rest: str = "fp32",
    ) -> None:
        ov = optional_import("openvino", "openvino")
        self.path = existing(path)
        self._core = ov.Core()
        model = self._read()
        has_facts = model.has_rt_info("backbones")
        facts = json.loads(model.get_rt_info("backbones").value) if has_facts else {}
        precision = _possible(precision, facts.get("precision", "fp32"))
        self.rest = _possible(rest, rest) if precision == "int8" else ""
        self._options = {
            "INFERENCE_PRECISION_HINT": HINTS[self.rest or precision],
            "INFERENCE_NUM_THREADS": (threads or torch.get_num_threads()) * streams,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if streams > 1:
            # Threads that are bound to cores would wait there for what else runs, such as decoding.
            self._options |= {"NUM_STREAMS": streams, "ENABLE_CPU_PINNING": False}
        taken = model.inputs[0]
        shape = [d.get_length() if d.is_static else None for d in taken.get_partial_shape()]
        raw = taken.get_element_type() == ov.Type.u8
        size = batch_size if shape[0] is None else None
        # by batch size, None for any; and of them those that take (B, H, W, C)
        self._compiled: dict[int | None, Any] = {}
        self._channels_last: set[int | None] = set()
        self._compile(model, size, raw)
        super().__init__(self.path, shape, threads=threads, raw=raw, metadata=facts)
        self.precision = precision
        self._lock = threading.Lock()
        self._of_thread = threading.local()

    def _read(self) -> Any:
        """Return the file's model."""
        with self._loading():
            return self._core.read_model(str(self.path))

    def _compile(self, model: Any, size: int | None, raw: bool) -> None:
        """Compile a model for a batch size; rewritten where that makes all shapes known."""
        with self._loading():
            if size is not None:
                dimensions = model.inputs[0].get_partial_shape()
                dimensions[0] = size
                model.reshape(dimensions)
            if not model.is_dynamic():
                norms_on_rows(model)
                scales_into_weights(model)
                single_outputs_by_lanes(model)
                widen_depthwise(model, self._options)
                if not raw:
                    self._channels_last.add(size)
                    model = _taking_channels_last(model)
            self._compiled[size] = self._core.compile_model(model, "CPU", self._options)

    def _loading(self) -> AbstractContextManager[None]:
        return explained(f"{self.path}: OpenVINO cannot load it")

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run this thread's own request: requests share the model, not the buffers."""
        size = len(x) if len(x) in self._compiled else None
        requests = self._of_thread.__dict__.setdefault("requests", {})
        if size not in requests:
            with self._lock:
                if size not in self._compiled:  # None, as the others were compiled in the beginning
                    self._compile(self._read(), None, self.raw)
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
    path = deployment.exported(f"{written}.xml", written)

    @cache  # what was measured is what is started
    def opened(rest: str) -> Runner:
        return OpenVinoRunner(
            path,
            threads=deployment.threads,
            batch_size=deployment.batch_size,
            precision=deployment.precision,
            streams=deployment.streams,
            rest=rest,
        )

    mixes = deployment.precision == "int8" and computes_in("bf16")
    return opened(rest_for(deployment, opened) if mixes else "fp32")


ENGINE = Engine(
    "openvino", _start, PRECISIONS, ("openvino", "onnx", "onnxscript"), extra="openvino"
)
FORMAT = Format(
    "openvino", ".xml", OpenVinoConfig, _to_openvino, OpenVinoRunner, ("fp32", "fp16", "int8")
)
