"""LiteRT (TensorFlow Lite): files for phones and boards, and their runtime with XNNPACK."""

from backbones.engines.litert.conversion import INPUT_LAYOUTS, LiteRtConfig
from backbones.engines.litert.target import ENGINE, FORMAT

__all__ = ["ENGINE", "FORMAT", "INPUT_LAYOUTS", "LiteRtConfig"]
