"""A Pareto front as JSON, CSV and picture."""

import dataclasses
from pathlib import Path
from typing import Any

from backbones.bench.machine import n_threads
from backbones.bench.pareto.rows import BudgetChoice, ParetoFront, ParetoRow
from backbones.errors import MissingDependencyError
from backbones.files import new_file, write_csv, write_json
from backbones.optional import new_figure, optional_import

__all__ = ["draw_front", "front_as_dict", "write_front"]

FILES = ("front.json", "front.csv", "front.png")
NAMED = 25  # models in a picture, above which only those on the front are named


def front_as_dict(front: ParetoFront, choice: BudgetChoice | None = None) -> dict[str, Any]:
    """Return a front, and what a budget allows of it, as JSON values."""
    chosen = None if choice is None else {**dataclasses.asdict(choice), "text": str(choice)}
    return {**dataclasses.asdict(front), "choice": chosen}


def write_front(
    front: ParetoFront, folder: str | Path, choice: BudgetChoice | None = None
) -> list[Path]:
    """Write ``front.json``, ``front.csv`` and ``front.png``, each whole or not at all.

    The picture needs matplotlib and is left out without it; an older one is then removed.

    Returns:
        The files written.
    """
    folder = Path(folder)
    facts, table, picture = (folder / name for name in FILES)
    folder.mkdir(parents=True, exist_ok=True)
    picture.unlink(missing_ok=True)
    write_json(facts, front_as_dict(front, choice))
    names = [field.name for field in dataclasses.fields(ParetoRow)]
    cells = ([_cell(getattr(row, name)) for name in names] for row in front.rows)
    write_csv(table, [names, *cells])
    try:
        with new_file(picture) as file:
            draw_front(front, file, choice)
    except MissingDependencyError:
        return [facts, table]
    return [facts, table, picture]


def draw_front(front: ParetoFront, path: str | Path, choice: BudgetChoice | None = None) -> None:
    """Draw published top-1 over measured latency into a picture file, the front as a line.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    rows = [row for row in front.rows if row.counts]
    best = [row for row in rows if row.on_front]
    machine, state = front.machine, "" if front.complete else " (incomplete)"
    plain = optional_import("matplotlib.ticker", "plot").LogFormatter(minor_thresholds=(2, 0.4))
    with new_figure(path, 9, 6) as figure:
        axes = figure.subplots()
        axes.scatter([r.median_ms for r in rows], [r.top1 for r in rows], s=16, color="0.6")
        axes.step([r.median_ms for r in best], [r.top1 for r in best], "o-", where="post", ms=5)
        for row in rows if len(rows) <= NAMED else best:
            at = (row.median_ms, row.top1)
            axes.annotate(row.model, at, xytext=(4, -9), textcoords="offset points", fontsize=7)
        if choice is not None:
            axes.axvline(choice.budget_ms, color="tab:red", lw=1, label=f"{choice.budget_ms:g} ms")
            axes.legend()
        axes.set(
            xscale="log",
            xlabel=f"median latency here, ms (batch of {front.batch_size}, {front.engine},"
            f" {front.precision}, {n_threads(machine.threads)})",
            ylabel="published ImageNet top-1, %",
            title=f"{machine.processor}{state}",
        )
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_formatter(plain)
        axes.grid(alpha=0.3, which="both")


def _cell(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return ("; " if value and isinstance(value[0], str) else "x").join(map(str, value))
