"""A front as table, JSON, CSV and picture."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from backbones.bench.budgets import Choice
from backbones.bench.files import put, write_json
from backbones.bench.machine import count
from backbones.bench.pareto_rows import Front, FrontRow
from backbones.bench.report import markdown
from backbones.errors import MissingDependencyError
from backbones.optional import optional_import

__all__ = ["FILES", "describe", "draw_front", "front_table", "write_front"]

FILES = ("front.json", "front.csv", "front.png")
NAMED = 25  # models in a picture, above which only those on the front are named
HEADS = ["model", "tag", "top-1 %", "M params", "GMACs", "median ms", "p90 ms", "spread"]
HEADS += ["engine", "front"]


def describe(front: Front, choice: Choice | None = None) -> dict[str, Any]:
    """Return a front, and the choice that was made from it, as JSON values."""
    chosen = None if choice is None else {**dataclasses.asdict(choice), "text": str(choice)}
    return {**front.as_dict(), "choice": chosen}


def front_table(front: Front) -> str:
    """Return the front as a Markdown table, with what has to be said about it below."""
    rows = [row for row in front.rows if row.median_ms is not None]
    lines = [str(front.machine), ""]
    lines += [markdown(HEADS, [_cells(row) for row in rows])] if rows else []
    lines += ["", *(f"{row.model}: {row.reason}" for row in front.rows if row.reason)]
    lines += front.problems
    other = [row for row in rows if row.top1_input_size and row.input_size != row.top1_input_size]
    if other:
        sizes = sorted({" x ".join(map(str, row.top1_input_size or ())) for row in other})
        lines.append(f"top-1 is published for another size than was measured: {', '.join(sizes)}")
    if front.precision != "fp32":
        lines.append(f"top-1 is the published one, of fp32; {front.precision} may have less")
    if not front.complete:
        lines.append(f"incomplete: interrupted before {', '.join(front.left_out)}")
    return "\n".join(lines)


def write_front(front: Front, folder: str | Path, choice: Choice | None = None) -> list[Path]:
    """Write ``front.json``, ``front.csv`` and ``front.png``, each whole or not at all.

    The picture needs matplotlib and is left out without it; an older one is then removed.

    Returns:
        The files written.
    """
    folder = Path(folder)
    facts, table, picture = (folder / name for name in FILES)
    picture.unlink(missing_ok=True)
    write_json(facts, describe(front, choice))
    put(table, lambda path: path.write_text(_csv(front), encoding="utf-8"))
    try:
        put(picture, lambda path: draw_front(front, path, choice))
    except MissingDependencyError:
        return [facts, table]
    return [facts, table, picture]


def draw_front(front: Front, path: str | Path, choice: Choice | None = None) -> None:
    """Draw published top-1 over measured latency into a picture file, the front as a line.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    # A Figure of its own needs no display and leaves pyplot's state alone.
    figure = optional_import("matplotlib.figure", "plot").Figure((9, 6), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in front.rows if row.measured and row.top1 is not None]
    best = [row for row in rows if row.on_front]
    axes.scatter([r.median_ms for r in rows], [r.top1 for r in rows], s=16, color="0.6")
    axes.step([r.median_ms for r in best], [r.top1 for r in best], "o-", where="post", ms=5)
    for row in rows if len(rows) <= NAMED else best:
        at = (row.median_ms, row.top1)
        axes.annotate(row.model, at, xytext=(4, -9), textcoords="offset points", fontsize=7)
    if choice is not None:
        axes.axvline(choice.budget_ms, color="tab:red", lw=1, label=f"{choice.budget_ms:g} ms")
        axes.legend()
    machine = front.machine
    state = "" if front.complete else " (incomplete)"
    axes.set(
        xscale="log",
        xlabel=f"median latency here, ms (batch of {front.batch_size}, {front.engine},"
        f" {front.precision}, {count(machine.threads)})",
        ylabel="published ImageNet top-1, %",
        title=f"{machine.processor}{state}",
    )
    plain = optional_import("matplotlib.ticker", "plot").LogFormatter(minor_thresholds=(2, 0.4))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110, format="png")


def _cells(row: FrontRow) -> list[str]:
    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value / scale, form)

    over = ">" if row.stopped else ""
    return [
        row.model,
        row.tag or "",
        number(row.top1, ".2f"),
        number(row.params, ".2f", 1e6),
        number(row.macs, ".3f", 1e9),
        over + number(row.median_ms, ".2f"),
        number(row.p90_ms, ".2f"),
        number(row.spread, ".0%"),
        row.engine or "",
        "*" if row.on_front else "",
    ]


def _csv(front: Front) -> str:
    stream = io.StringIO()
    names = [field.name for field in dataclasses.fields(FrontRow)]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    for row in front.rows:
        writer.writerow([_plain(getattr(row, name)) for name in names])
    return stream.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return (
            "; ".join(value) if value and isinstance(value[0], str) else "x".join(map(str, value))
        )
    return value
