"""What a run over a collection is asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from backbones.errors import ConfigError

__all__ = ["Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of `predict`, and `features`: embeddings instead of predictions.

    Raises:
        ConfigError: a number below 1.
    """

    features: bool
    top_k: int = 5
    batch_size: int | None = None
    engine: str = "auto"
    precision: str = "fp32"
    threads: int | None = None
    workers: int | None = None
    input_size: Sequence[int] | None = None
    classes: Sequence[str] | None = None
    calibration: Any = None
    reduce: bool = False
    strict: bool = False
    full_paths: bool = False
    cache_dir: str | PathLike[str] | None = None
    progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "top_k", "threads", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
