"""What LiteRT is as a format and as an engine."""

from backbones.engines.formats import Format
from backbones.engines.litert.conversion import LiteRtConfig, to_litert
from backbones.engines.litert.runner import LiteRtRunner
from backbones.engines.runners import Deployment, Engine, Runner

__all__ = ["ENGINE", "FORMAT"]


def _start(deployment: Deployment) -> Runner:
    """Export to LiteRT for this number of images and run it."""
    batch, precision = deployment.batch_size, deployment.precision
    config = LiteRtConfig(images=batch)
    path = deployment.exported(f"{precision}-{batch}.tflite", precision, config)
    return LiteRtRunner(path, threads=deployment.threads)


_PRECISIONS = ("fp32", "fp16", "int8")
FORMAT = Format(
    "litert",
    ".tflite",
    LiteRtConfig,
    to_litert,
    LiteRtRunner,
    _PRECISIONS,
    dynamic=("batch",),
    computes_half=False,
)
ENGINE = Engine(
    "litert",
    _start,
    _PRECISIONS,
    ("ai_edge_litert", "litert_torch", "ai_edge_quantizer"),
    extra="litert",
)
