"""Export to deployment formats, each file proved against the model, and runners for the files."""

from __future__ import annotations

from backbones.engines.caching import processor, versions
from backbones.engines.deploying import Candidate, DeployReport, deploy
from backbones.engines.executorch import ExecuTorchConfig
from backbones.engines.exporting import ExportReport, export
from backbones.engines.formats import (
    FormatConfig,
    available_formats,
    file_suffixes,
    open_exported,
)
from backbones.engines.metadata import check_input_size, input_size_of
from backbones.engines.onnx import OnnxConfig, OnnxRuntimeRunner
from backbones.engines.openvino.files import OpenVinoConfig
from backbones.engines.pytorch.programs import AotiConfig, Pt2Config
from backbones.engines.runners import Runner
from backbones.engines.starting import ENGINES, available_engines
from backbones.engines.threads import torch_threads
from backbones.engines.timing import settle, take_turns, timed_for
from backbones.engines.verification import Agreement, compare

__all__ = [
    "ENGINES",
    "Agreement",
    "AotiConfig",
    "Candidate",
    "DeployReport",
    "ExecuTorchConfig",
    "ExportReport",
    "FormatConfig",
    "OnnxConfig",
    "OnnxRuntimeRunner",
    "OpenVinoConfig",
    "Pt2Config",
    "Runner",
    "available_engines",
    "available_formats",
    "check_input_size",
    "compare",
    "deploy",
    "export",
    "file_suffixes",
    "input_size_of",
    "open_exported",
    "processor",
    "settle",
    "take_turns",
    "timed_for",
    "torch_threads",
    "versions",
]
