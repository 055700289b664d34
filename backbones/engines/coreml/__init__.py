"""Core ML: packages (``.mlpackage``) for apps on Apple's systems, which alone run them."""

from backbones.engines.coreml.conversion import COREML_TARGETS, CoreMlConfig
from backbones.engines.coreml.runner import FORMAT

__all__ = ["FORMAT", "COREML_TARGETS", "CoreMlConfig"]
