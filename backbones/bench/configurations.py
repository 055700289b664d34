"""The configurations that a benchmark compares: an engine at a precision, and its conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backbones.bench.model_spec import ModelSpec
from backbones.engines import ENGINES, PRECISIONS, available_engines, check_input_size
from backbones.errors import ConfigError, MissingDependencyError, nearest

__all__ = ["PUBLISHED", "Conditions", "Configuration", "list_configurations", "require_engine"]

AUTO_START_S = 20.0  # in which an engine must have started for ``auto`` to consider it


@dataclass(frozen=True)
class Configuration:
    """An engine at a precision; `form` is ``published`` or ``reparameterized``."""

    engine: str
    precision: str
    form: str

    def __str__(self) -> str:
        return "published" if self.form == "published" else f"{self.engine} {self.precision}"


PUBLISHED = Configuration("eager", "fp32", "published")


@dataclass(frozen=True)
class Conditions:
    """What is the same for all configurations.

    `input_size` is (C, H, W), (H, W) with the model's channels, or None for the model's own.
    """

    batch_size: int
    threads: int
    input_size: Sequence[int] | None
    calibration: str | Path | None
    warmup_s: float = 0.3

    def check(self, precisions: Sequence[str], seconds: float) -> None:
        """Refuse what no process can measure, by ConfigError."""
        for name, value in (("batch_size", self.batch_size), ("threads", self.threads)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < seconds < math.inf:
            raise ConfigError(f"seconds must be more than 0 and finite, got {seconds}")
        if self.input_size is not None:
            check_input_size(self.input_size)
        if not precisions:
            raise ConfigError(f"no precisions; there are {', '.join(PRECISIONS)}")
        for precision in precisions:
            if precision not in PRECISIONS:
                raise _unknown("precision", precision, PRECISIONS)
        if "int8" in precisions and self.calibration is None:
            raise ConfigError(
                "int8 needs images like those of later use to find its ranges; name a folder of"
                " them (calibration=..., --calibration)"
            )
        if self.calibration is not None and not Path(self.calibration).is_dir():
            raise ConfigError(f"{self.calibration}: no such folder of images for calibration")

    def at(self, size: Sequence[int] | None) -> Conditions:
        """Return the same conditions at `size`, unless they name a size of their own."""
        return self if self.input_size is not None else replace(self, input_size=size)

    def job(self, spec: ModelSpec, configuration: Configuration, folder: Path) -> dict[str, Any]:
        """Return the request that makes a worker load a model.

        Engines keep their files in `folder`, which is to be removed afterwards: what is made of
        random weights is of no use later, and fills a disk when there are many models.
        """
        return {
            "do": "load",
            "model": asdict(spec),
            **asdict(configuration),
            "batch_size": self.batch_size,
            "threads": self.threads,
            "input_size": None if self.input_size is None else list(self.input_size),
            "calibration": None if self.calibration is None else str(self.calibration),
            "cache_dir": str(folder / "engines"),
            "auto_start_s": AUTO_START_S,
            "warmup_s": self.warmup_s,
        }


def list_configurations(
    engines: Sequence[str] | None, precisions: Sequence[str]
) -> list[Configuration]:
    """Return what to compare: the published form first, then each engine at each precision.

    Engines are those installed where none are given; ``published`` among them adds nothing.
    """
    if isinstance(engines, str) or isinstance(precisions, str):
        raise ConfigError("engines and precisions are lists: engines=['eager']")
    if engines is None:
        engines = available_engines()
    else:
        if not engines:
            raise ConfigError("no engines to measure; leave engines out for all installed ones")
        engines = [name for name in engines if require_engine(name) != "published"]
    pairs = [(engine, precision) for engine in engines for precision in precisions]
    return [PUBLISHED, *(Configuration(*pair, "reparameterized") for pair in dict.fromkeys(pairs))]


def require_engine(name: str, others: Sequence[str] = ()) -> str:
    """Return the name of an engine, ``published`` or one of `others`, once it is found installed.

    Raises:
        ConfigError: no such engine.
        MissingDependencyError: it is not installed.
    """
    known = ("published", *ENGINES, *others)
    if name not in known:
        raise _unknown("engine", name, known)
    if name in ENGINES and name not in available_engines():
        raise MissingDependencyError(
            f'engine {name!r} is not installed; pip install ".[{ENGINES[name].extra}]"'
        )
    return name


def _unknown(kind: str, name: str, known: Sequence[str]) -> ConfigError:
    return ConfigError(f"no {kind} {name!r}{nearest(name, known)} (there are {', '.join(known)})")
