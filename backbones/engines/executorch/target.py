"""What ExecuTorch is as a format and as an engine."""

from backbones.engines.executorch.lowering import ExecuTorchConfig, to_executorch
from backbones.engines.executorch.runner import ExecuTorchRunner
from backbones.engines.formats import Format
from backbones.engines.runners import Deployment, Engine, Runner

__all__ = ["ENGINE", "FORMAT"]


def _start(deployment: Deployment) -> Runner:
    """Export to ExecuTorch for this number of images and run it."""
    batch, precision = deployment.batch_size, deployment.precision
    config = ExecuTorchConfig(images=batch)
    path = deployment.exported(f"{precision}-{batch}.pte", precision, config)
    return ExecuTorchRunner(path, threads=deployment.threads)


_PRECISIONS = ("fp32", "int8")
FORMAT = Format(
    "executorch",
    ".pte",
    ExecuTorchConfig,
    to_executorch,
    ExecuTorchRunner,
    _PRECISIONS,
    dynamic_raw=("batch",),
)
ENGINE = Engine("executorch", _start, _PRECISIONS, ("executorch",), extra="executorch")
