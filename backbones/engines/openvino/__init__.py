"""OpenVINO: its files, its runner, and the passes over its graphs."""

from backbones.engines.openvino.runner import ENGINE, FORMAT, OpenVinoConfig, OpenVinoRunner

__all__ = ["ENGINE", "FORMAT", "OpenVinoConfig", "OpenVinoRunner"]
