"""throughput(): images a second of one model, each engine at its best batch size and streams."""

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones.bench.configurations import Conditions, list_configurations
from backbones.bench.machine import Machine, examine
from backbones.bench.measuring import Progress
from backbones.bench.model_spec import specify_model
from backbones.bench.report import markdown, number
from backbones.engines import (
    Setting,
    ThroughputRunner,
    deploy_for_throughput,
    input_size_of,
    throughput_engines,
)
from backbones.errors import BackbonesError, ConfigError, MissingDependencyError

__all__ = ["ThroughputReport", "ThroughputRow", "throughput"]

_TURNS = 5


@dataclass(frozen=True)
class ThroughputRow:
    """An engine at a precision, in its best setting.

    `images_per_second` is the median of its turns. What was not measured is None, and `reason`
    says why.
    """

    engine: str
    precision: str
    setting: Setting | None = None
    images_per_second: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ThroughputReport:
    """The rows, the fastest first; `input_size` is (C, H, W)."""

    model: str
    weights: str
    input_size: tuple[int, ...]
    machine: Machine
    rows: tuple[ThroughputRow, ...]

    @property
    def best(self) -> ThroughputRow | None:
        """The row with the most images a second; None where nothing was measured."""
        return next((row for row in self.rows if row.images_per_second is not None), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        lines = [f"{self.model}: {self.weights} weights, images {size}", str(self.machine), ""]
        measured = [row for row in self.rows if row.setting is not None]
        lines += [markdown([_cells(row) for row in measured])] if measured else []
        lines += [
            f"{row.engine} {row.precision} was not measured: {row.reason}"
            for row in self.rows
            if row.reason
        ]
        return "\n".join(lines)


def throughput(
    model: nn.Module | str | Path | None,
    *,
    checkpoint: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    engines: Sequence[str] | None = None,
    precisions: Sequence[str] = ("fp32",),
    batch_size: int | None = None,
    threads: int | None = None,
    input_size: Sequence[int] | None = None,
    seconds: float = 2.0,
    calibration: str | Path | None = None,
    progress: Progress | None = None,
) -> ThroughputReport:
    """Measure how many images a second a model does in each engine.

    Each engine's batch size, streams and threads are chosen by measurement, as
    ``deploy(hint="throughput")`` does; then all take turns in this process.

    Args:
        model, checkpoint, overrides, precisions, threads, input_size, calibration, progress: as for
            `benchmark`.
        engines: as for `benchmark`; None for those made for many images that are installed.
        batch_size: images of a call; None for the best of each engine.
        seconds: timed seconds of each row.

    Raises:
        ConfigError, UnknownModelError, UnsupportedError, MissingDependencyError, ChildError: as for
            `benchmark`.
    """
    threads = torch.get_num_threads() if threads is None else threads
    conditions = Conditions(
        1 if batch_size is None else batch_size, threads, input_size, calibration
    )
    conditions.check(precisions, seconds)
    names = throughput_engines() if engines is None else engines
    wanted = list_configurations(names, precisions)[1:]
    if not wanted:
        raise ConfigError("the published form has no setting; name engines")
    say = progress or (lambda share, words: None)
    with tempfile.TemporaryDirectory(prefix="backbones-bench-") as folder:
        spec = specify_model(model, Path(folder), checkpoint=checkpoint, overrides=overrides)
        module = spec.build()
        say(0.0, "measuring matrix products")
        machine = examine(threads, ["fp32"])
        found: dict[tuple[str, str], ThroughputRunner] = {}
        rows = []
        for done, one in enumerate(wanted):
            say(0.1 + 0.7 * done / len(wanted), f"looking for the best setting of {one}")
            try:
                found[one.engine, one.precision] = deploy_for_throughput(
                    module,
                    engine=one.engine,
                    precision=one.precision,
                    threads=threads,
                    batch_size=batch_size,
                    input_size=input_size,
                    calibration=calibration,
                    agreement=spec.agreement,
                    cache_dir=folder,
                )
            except MissingDependencyError:
                raise
            except BackbonesError as error:
                rows.append(ThroughputRow(one.engine, one.precision, reason=str(error)))
        turns: dict[tuple[str, str], list[float]] = {key: [] for key in found}
        for turn in range(_TURNS):
            say(0.8 + 0.2 * turn / _TURNS, f"turn {turn + 1} of {_TURNS}")
            for key, runner in found.items():
                turns[key].append(runner.images_per_second(seconds / _TURNS))
    rows += [
        ThroughputRow(*key, found[key].setting, statistics.median(figures))
        for key, figures in turns.items()
    ]
    return ThroughputReport(
        model=spec.name,
        weights=spec.weights,
        input_size=tuple(input_size_of(module, input_size)),
        machine=machine,
        rows=tuple(sorted(rows, key=lambda row: -(row.images_per_second or 0.0))),
    )


def _cells(row: ThroughputRow) -> dict[str, str]:
    assert row.setting is not None
    return {
        "engine": f"{row.engine} {row.precision}",
        "images/s": number(row.images_per_second, ".1f"),
        "batch size": str(row.setting.batch_size),
        "streams": str(row.setting.streams),
        "threads each": str(row.setting.threads),
    }
