"""OpenVINO: its files, its runner, and the passes over its graphs."""

from backbones.engines.openvino.files import OpenVinoConfig, OpenVinoRunner, computes_in

__all__ = ["OpenVinoConfig", "OpenVinoRunner", "computes_in"]
