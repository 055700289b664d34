"""OpenVINO: its files, its runner, and the passes over its graphs."""

from backbones.engines.openvino.format import FORMAT, OpenVinoConfig
from backbones.engines.openvino.runner import ENGINE, OpenVinoRunner

__all__ = ["ENGINE", "FORMAT", "OpenVinoConfig", "OpenVinoRunner"]
