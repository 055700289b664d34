"""What a benchmark found, for programs and for people."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backbones.bench.configurations import Configuration
from backbones.bench.machine import Machine
from backbones.bench.measuring import Measurement
from backbones.bench.statistics import Times, certain, too_noisy

__all__ = ["BenchReport", "Row", "markdown", "number", "row_of", "verdict_on"]


@dataclass(frozen=True)
class Row:
    """One configuration. What was not measured is None, and `reason` then says why.

    Attributes:
        engine: what ran it.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        form: ``published`` (the authors', in eager PyTorch) or ``reparameterized``.
        layout: of the images in memory, as the engine chose it.
        median_ms, p90_ms: of one call, a whole batch.
        spread: interquartile range of the calls over their median.
        calls: how many were timed.
        images_per_second: at the median.
        gmacs_per_second: thousand millions of the *published* form's multiply-adds a second, so
            that the rows of a model compare; a form that needs fewer looks better for it.
        share_of_peak: of the machine's measured fp32 matrix products.
        peak_mib: most memory that the process held, libraries and conversion included.
        base_mib: what it held before the model was loaded.
        load_s: seconds to create, convert and compile.
        threads: what the engine uses.
        cores: processors at work on average while it was timed.
        speedup: the published form's median over this one's.
        certain: whether it is certain which of the two is faster (`backbones.bench.statistics`).
        reason: why it was not measured.
    """

    engine: str
    precision: str
    form: str
    layout: str | None = None
    median_ms: float | None = None
    p90_ms: float | None = None
    spread: float | None = None
    calls: int = 0
    images_per_second: float | None = None
    gmacs_per_second: float | None = None
    share_of_peak: float | None = None
    peak_mib: float | None = None
    base_mib: float | None = None
    load_s: float | None = None
    threads: int | None = None
    cores: float | None = None
    speedup: float | None = None
    certain: bool | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """Engine and precision, or ``published``."""
        return str(Configuration(self.engine, self.precision, self.form))


@dataclass(frozen=True)
class BenchReport:
    """How fast a model runs here, the published form first.

    `macs` (multiply-adds an image) and `params` are of the published form. `conclusive` tells
    whether the two fastest could be told apart, None with fewer than two; `verdict` says so in
    words. `problems` are sentences about what makes figures doubtful.
    """

    model: str
    weights: str
    params: int | None
    macs: int | None
    batch_size: int
    input_size: tuple[int, ...] | None
    machine: Machine
    rows: tuple[Row, ...]
    verdict: str
    conclusive: bool | None
    problems: tuple[str, ...]

    @property
    def best(self) -> Row | None:
        """The fastest row by median; None where nothing could be measured."""
        measured = [row for row in self.rows if row.median_ms is not None]
        return min(measured, key=lambda row: row.median_ms or 0.0, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        best = self.best
        return {**dataclasses.asdict(self), "best": best and best.name}

    def __str__(self) -> str:
        size = " x ".join(map(str, self.input_size)) if self.input_size else "unknown size"
        facts = [f"batch of {self.batch_size} at {size}", f"{self.weights} weights"]
        if self.params is not None:
            facts.insert(0, f"{self.params / 1e6:.2f} M parameters")
        if self.macs is not None:
            facts.insert(1, f"{self.macs / 1e9:.3f} GMACs")
        lines = [f"{self.model}: {', '.join(facts)}", str(self.machine), ""]
        measured = [row for row in self.rows if row.median_ms is not None]
        lines += [markdown([_cells(row) for row in measured]), ""] if measured else []
        lines += [f"{row.name} was not measured: {row.reason}" for row in self.rows if row.reason]
        return "\n".join([*lines, *self.problems, self.verdict])


def row_of(
    configuration: Configuration,
    found: Measurement,
    baseline: Times | None,
    macs: int | None,
    batch_size: int,
    machine: Machine,
) -> Row:
    """Put figures to a measurement."""
    facts, times = found.facts, found.times
    what = (facts.get("engine", configuration.engine), configuration.precision, configuration.form)
    if times is None:
        return Row(*what, layout=facts.get("layout"), reason=found.reason)
    per_second = 1e3 * batch_size / times.median
    gmacs = None if macs is None else macs * per_second / 1e9
    is_other = baseline is not times and configuration.form != "published"
    return Row(
        *what,
        layout=facts["layout"],
        median_ms=times.median,
        p90_ms=times.p90,
        spread=times.spread,
        calls=len(times.calls),
        images_per_second=per_second,
        gmacs_per_second=gmacs,
        share_of_peak=None if gmacs is None else gmacs / machine.matmul_gmacs["fp32"],
        peak_mib=found.peak_mib,
        base_mib=facts["base_mib"],
        load_s=facts["load_s"],
        threads=facts.get("engine_threads", facts["threads"]),
        cores=found.cpu_s / found.wall_s,
        speedup=None if baseline is None else baseline.median / times.median,
        certain=certain(times, baseline) if is_other and baseline is not None else None,
    )


def verdict_on(times: dict[str, Times]) -> tuple[str, bool | None]:
    """Say which configuration is the fastest, or that nobody can tell."""
    ranked = sorted(times, key=lambda name: times[name].median)
    if not ranked:
        return "nothing could be measured", None
    if len(ranked) == 1:
        return f"only {ranked[0]} was measured", None
    first, second = ranked[:2]
    doubt = too_noisy(first, times[first], second, times[second])
    if doubt:
        return f"{doubt}; which of the two is faster is not known", False
    ratio = times[second].median / times[first].median
    return f"{first} is the fastest, {ratio:.2f} times as fast as {second}", True


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table whose columns are aligned; all but the first two to the right.

    Each row holds its cells by the heads of their columns.
    """
    heads, *cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *cells)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(heads), line(rule), *map(line, cells)])


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """Return a number, divided by `scale`, as a table shows it; nothing where there is none."""
    return "" if value is None else format(value / scale, form)


def _cells(row: Row) -> dict[str, str]:
    doubt = " (uncertain)" if row.certain is False else ""
    return {
        "configuration": row.name,
        "layout": row.layout or "",
        "median ms": number(row.median_ms, ".2f"),
        "p90 ms": number(row.p90_ms, ".2f"),
        "spread": number(row.spread, ".0%"),
        "images/s": number(row.images_per_second, ".1f"),
        "GMAC/s": number(row.gmacs_per_second, ".1f"),
        "of peak": number(row.share_of_peak, ".0%"),
        "peak MiB": number(row.peak_mib, ".0f"),
        "speedup": number(row.speedup, ".2f") + doubt,
    }
