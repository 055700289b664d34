"""Export to deployment formats, each file proved against the model, and runners for the files."""

from __future__ import annotations

from backbones.engines.agreement import Agreement, compare
from backbones.engines.exporting import ExportReport, export
from backbones.engines.formats import (
    FormatConfig,
    OnnxConfig,
    available_formats,
    file_suffixes,
    open_exported,
)
from backbones.engines.runners import OnnxRuntimeRunner, Runner

__all__ = [
    "Agreement",
    "ExportReport",
    "FormatConfig",
    "OnnxConfig",
    "OnnxRuntimeRunner",
    "Runner",
    "available_formats",
    "compare",
    "export",
    "file_suffixes",
    "open_exported",
]
