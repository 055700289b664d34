"""Export to deployment formats, each file compared with the model, and runners for the files."""

from backbones.engines.caching import content_key, processor, versions
from backbones.engines.coreml import COREML_TARGETS, CoreMlConfig
from backbones.engines.deploying import Candidate, DeployReport, deploy
from backbones.engines.executorch import ExecuTorchConfig
from backbones.engines.exporting import AGREEMENT, ExportReport, export
from backbones.engines.formats import FormatConfig
from backbones.engines.litert import INPUT_LAYOUTS, LiteRtConfig
from backbones.engines.ncnn import NcnnConfig
from backbones.engines.onnx import OnnxConfig, OnnxRuntimeRunner
from backbones.engines.openvino import OpenVinoConfig
from backbones.engines.preparation import PRECISIONS, check_input_size, input_size_of
from backbones.engines.pytorch import AotiConfig, Pt2Config
from backbones.engines.quantization import equalize
from backbones.engines.runners import Runner
from backbones.engines.targets import (
    ENGINES,
    available_engines,
    available_formats,
    file_suffixes,
    open_exported,
)
from backbones.engines.throughput import (
    Setting,
    StreamedRunner,
    ThroughputRunner,
    deploy_for_throughput,
    throughput_engines,
)
from backbones.engines.timing import settle, take_turns, timed, timed_for, torch_threads
from backbones.engines.verification import Agreement, compare
from backbones.engines.web import WebConfig

__all__ = [
    "AGREEMENT",
    "COREML_TARGETS",
    "ENGINES",
    "INPUT_LAYOUTS",
    "PRECISIONS",
    "Agreement",
    "AotiConfig",
    "Candidate",
    "CoreMlConfig",
    "DeployReport",
    "ExecuTorchConfig",
    "ExportReport",
    "FormatConfig",
    "LiteRtConfig",
    "NcnnConfig",
    "OnnxConfig",
    "OnnxRuntimeRunner",
    "OpenVinoConfig",
    "Pt2Config",
    "Runner",
    "Setting",
    "StreamedRunner",
    "ThroughputRunner",
    "WebConfig",
    "available_engines",
    "available_formats",
    "check_input_size",
    "compare",
    "content_key",
    "deploy",
    "deploy_for_throughput",
    "equalize",
    "export",
    "file_suffixes",
    "input_size_of",
    "open_exported",
    "processor",
    "settle",
    "take_turns",
    "throughput_engines",
    "timed",
    "timed_for",
    "torch_threads",
    "versions",
]
