"""ONNX: PyTorch's exporter in, ONNX Runtime out.

int8 is static: weights a channel, activations a tensor, ranges from real images. The engine's own
quantizer places the operations where the engine can fuse them, but for layers that cost too much.
"""

import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from backbones.engines.formats import Conversion, Format, FormatConfig, Notes
from backbones.engines.opsets import EXPORTED, OLDEST, lower_opset
from backbones.engines.quantization import CONVOLUTIONS, Plan, outputs_of, to_target
from backbones.engines.rewrites import rewrite_for_graphs
from backbones.engines.runners import Deployment, Engine, Runner, existing, explained
from backbones.errors import ConfigError
from backbones.optional import optional_import

__all__ = ["ENGINE", "FORMAT", "OnnxConfig", "OnnxRuntimeRunner", "to_onnx", "write_onnx"]

LARGEST = 2**31 - 2**20  # protobuf's limit for one file, with room for the graph itself
QUANTIZABLE = 13  # the first opset with a scale for each channel
QUANTIZED = ("Conv", "Gemm", "MatMul")  # norms, spectra and pooled statistics stay in float32
# The engine has kernels of these that give float32, which are as fast and less far off.
UNROUNDED = ("Gemm", "MatMul")


@dataclass(frozen=True)
class OnnxConfig(FormatConfig):
    """ONNX by PyTorch's exporter over `torch.export`.

    `opset` is the file's, 11 (in int8: 13) or later; None is the exporter's own choice. An opset
    without a form of the model is refused. `output_names` are in the order of the model's outputs;
    None is ``logits``, or ``features_0`` and so on.
    """

    opset: int | None = None
    input_name: str = "input"
    output_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.opset is not None and (not isinstance(self.opset, int) or self.opset < OLDEST):
            raise ConfigError(f"no opset {self.opset!r} can be written; give {OLDEST} or later")
        names = [self.input_name, *(self.output_names or ())]
        if not all(names) or len({*names}) < len(names):
            raise ConfigError(f"names of inputs and outputs must differ and not be empty: {names}")

    def outputs(self, conversion: Conversion) -> list[str]:
        """Return the names of a model's outputs.

        Raises:
            ConfigError: more or fewer were given than the model has.
        """
        names = list(self.output_names or conversion.outputs)
        if len(names) != len(conversion.outputs):
            has = ", ".join(conversion.outputs)
            raise ConfigError(f"{len(names)} output names for {len(conversion.outputs)}: {has}")
        return names


def to_onnx(conversion: Conversion, config: OnnxConfig, path: Path) -> Notes:
    """Write an ONNX file with the metadata property ``backbones`` (JSON).

    Weights beyond the 2 GB that one file holds go to ``<path>.data`` beside it. In int8 the
    weights and activations of convolutions and products are quantized, with QuantizeLinear and
    DequantizeLinear around them; preprocessing stays in float32.
    """
    if conversion.precision == "int8" and (config.opset or EXPORTED) < QUANTIZABLE:
        raise ConfigError(f"int8 needs opset {QUANTIZABLE} or later, got {config.opset}")
    if conversion.precision != "int8":
        write_onnx(conversion, config, path)
        return {}
    with TemporaryDirectory(dir=path.parent) as folder:
        between = Path(folder, path.name)
        if conversion.raw:
            before, model = conversion.parts()
            first = Path(folder, f"preprocessing of {path.name}")
            write_onnx(before, dataclasses.replace(config, output_names=None), first)
            notes = to_onnx(model, config, between)
            with explained(f"{path.name}: the preprocessing cannot be put before the model"):
                _join(first, between, config.input_name, path)
            return notes
        program = write_onnx(conversion, config, between)
        with explained(f"{path.name}: ONNX Runtime cannot quantize it"):
            return _quantize(between, path, conversion, config.input_name, program)


def write_onnx(
    conversion: Conversion, config: OnnxConfig, path: Path, decompose: bool = False
) -> GraphModule:
    """Write the ONNX file of a model in its precision; `decompose` as for `rewrite_for_graphs`.

    Returns what was recorded: names of its layers are those of values in the file.
    """
    optional_import("onnx", "onnx")
    optional_import("onnxscript", "onnx")
    model = rewrite_for_graphs(conversion.model, decompose=decompose)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    asked, outputs = config.opset, config.outputs(conversion)
    shapes = {axis: torch.export.Dim(name, max=2**31 - 1) for axis, name in conversion.axes.items()}
    with explained(f"{path.name}: PyTorch's ONNX exporter failed"):
        program = torch.onnx.export(
            model,
            (conversion.example,),
            dynamo=True,
            dynamic_shapes=(shapes,) if shapes else None,
            input_names=[config.input_name],
            output_names=outputs,
            opset_version=None if asked is None else max(asked, EXPORTED),
            verbose=False,
        )
        assert program is not None  # it is None with the exporter of old only
        facts = json.dumps({**conversion.metadata, "outputs": outputs}, allow_nan=False)
        program.model.metadata_props["backbones"] = facts
        program.save(path, external_data=size > LARGEST)
        written = program.model.opset_imports[""]
        assert program.exported_program is not None
        recorded = program.exported_program.module()
    if asked is None or asked == written:
        return recorded
    if asked > written:
        raise ConfigError(f"{path.name}: no opset {asked}; PyTorch's exporter wrote {written}")
    with explained(f"{path.name}: opset {asked} cannot hold this model, {EXPORTED} and later can"):
        lower_opset(path, asked)
    return recorded


def _join(first: Path, second: Path, name: str, path: Path) -> None:
    """Write one file of two: the output of the first is the input `name` of the second."""
    onnx = optional_import("onnx", "onnx")
    before, model = onnx.load(str(first)), onnx.load(str(second))
    before = onnx.compose.add_prefix(before, "preprocessing/", rename_inputs=False)
    before.ir_version = model.ir_version
    del before.metadata_props[:]  # of the whole file are those of the model
    ends = [(before.graph.output[0].name, name)]
    whole = onnx.compose.merge_models(before, model, ends)
    used = {node.domain for node in whole.graph.node}
    del whole.opset_import[:]  # which has those of both
    whole.opset_import.extend(one for one in model.opset_import if one.domain in used)
    onnx.save(whole, str(path))


class _Batches:
    """Calibration images, a batch at a time, as ONNX Runtime's quantizer reads them."""

    def __init__(self, name: str, batches: Iterator[Tensor]) -> None:
        self._left = batches
        self._name = name

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch by input name; None at the end."""
        batch = next(self._left, None)
        return None if batch is None else {self._name: batch.numpy()}


def _quantize(
    source: Path, path: Path, conversion: Conversion, name: str, program: GraphModule
) -> Notes:
    """Write the int8 form (QuantizeLinear and DequantizeLinear) of an ONNX file."""
    tools = optional_import("onnxruntime.quantization", "onnx")
    prepared = source.with_name(f"prepared-{source.name}")
    shaped = optional_import("onnxruntime.quantization.shape_inference", "onnx")
    shaped.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    graph = optional_import("onnx", "onnx").load(str(prepared), load_external_data=False).graph
    layers = _layers(graph, program)
    values = {value for node in graph.node for value in (*node.input, *node.output)}

    def make(plan: Plan) -> None:
        ranges = {
            value: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
            for value, (low, high) in plan.ranges.items()
            if value in values
        }
        tools.quantize_static(
            str(prepared),
            str(path),
            _Batches(name, conversion.calibration_batches(plan.images)),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=[node for node, layer in layers.items() if layer in plan.kept],
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            calibrate_method=tools.CalibrationMethod.MinMax,
            # 8 bits in the weights would overflow the 16-bit sums of processors without VNNI.
            reduce_range=not _has_vnni(),
            extra_options={
                "TensorQuantOverrides": ranges,
                "OpTypesToExcludeOutputQuantization": list(UNROUNDED),
            },
        )

    return to_target(
        conversion, program, make, lambda: OnnxRuntimeRunner(path), rounded=CONVOLUTIONS
    )


def _layers(graph: Any, program: GraphModule) -> dict[str, str]:
    """Return the recorded layer of each node that int8 is about, by the node's name.

    A product that a bias follows gives a value of another name; the sum has the layer's.
    """
    names = {node.name: node.name for node in program.graph.nodes}
    names |= zip((one.name for one in graph.output), outputs_of(program))
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    found = {}
    for node in graph.node:
        if node.op_type in QUANTIZED:
            value = node.output[0]
            if value not in names and len(readers.get(value, [])) == 1:
                value = readers[value][0].output[0]
            found[node.name] = names.get(value, value)
    return found


def _has_vnni() -> bool:
    """Tell whether the processor sums products of 8-bit numbers in 32 bits."""
    flags = Path("/proc/cpuinfo")
    if not flags.is_file():
        return False
    text = flags.read_text(encoding="utf-8", errors="replace")
    return any(flag in text for flag in ("avx512_vnni", "avx_vnni", "asimddp", "i8mm"))


class OnnxRuntimeRunner(Runner):
    """An ONNX file in ONNX Runtime's CPU engine.

    Args:
        path: the file.
        threads: threads of one call; None for PyTorch's number.
        batch_size: number of images that calls mostly have. The session for it knows all shapes
            and is faster; calls with another number get a session of their own.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        ExportError: ONNX Runtime cannot load the file.
    """

    engine = "onnxruntime"

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        threads: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.path = existing(path)
        self._threads = threads or torch.get_num_threads()
        self._session = self._start(batch_size)
        self._batch_size = batch_size
        self._any: Any = None
        self._lock = threading.Lock()
        taken = self._session.get_inputs()[0]
        # The session for one number of images says that number in place of the free dimension.
        shape = taken.shape if batch_size is None else [None, *taken.shape[1:]]
        found = self._session.get_modelmeta().custom_metadata_map.get("backbones")
        super().__init__(
            self.path,
            shape,
            threads=threads,
            raw=taken.type == "tensor(uint8)",
            metadata=json.loads(found) if found else {},
        )
        self._name = taken.name

    def _start(self, batch_size: int | None) -> Any:
        ort = optional_import("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if batch_size is not None:
            options.add_free_dimension_override_by_name("batch", batch_size)
        # Idle threads that spin would take the cores from whatever runs between two calls.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with explained(f"{self.path}: ONNX Runtime cannot load it"):
            return ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run the session for this number of images."""
        session = self._session
        if self._batch_size not in (None, len(x)):
            with self._lock:
                self._any = self._any or self._start(None)
            session = self._any
        return [torch.from_numpy(one) for one in session.run(None, {self._name: x.numpy()})]


def _start(deployment: Deployment) -> Runner:
    """Export to ONNX and run it in ONNX Runtime."""
    path = deployment.exported(f"{deployment.precision}.onnx", deployment.precision)
    return OnnxRuntimeRunner(path, threads=deployment.threads, batch_size=deployment.batch_size)


_PRECISIONS = ("fp32", "fp16", "int8")
FORMAT = Format("onnx", ".onnx", OnnxConfig, to_onnx, OnnxRuntimeRunner, _PRECISIONS)
ENGINE = Engine(
    "onnxruntime", _start, _PRECISIONS, ("onnx", "onnxscript", "onnxruntime"), extra="onnx"
)
