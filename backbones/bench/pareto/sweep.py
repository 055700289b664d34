"""front(): published accuracy against latency measured here, of many models."""

import dataclasses
import fnmatch
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from backbones.bench.configurations import PUBLISHED, Conditions, Configuration, require_engine
from backbones.bench.machine import examine
from backbones.bench.measuring import STOPPED, Measurement, Progress, measure_in_turns
from backbones.bench.model_spec import specify_model
from backbones.bench.pareto.rows import ParetoFront, ParetoRow, mark_front
from backbones.errors import ConfigError, UnknownModelError
from backbones.factory import find_variant, list_models
from backbones.info import model_info
from backbones.manifest import load_manifest

__all__ = ["front"]

HOPELESS = 3.0  # times the budget: a warm-up that is slower settles it
WILDCARDS = "*?["


def front(
    models: Sequence[str] | None = None,
    *,
    engine: str = "auto",
    precision: str = "fp32",
    batch_size: int = 1,
    threads: int | None = None,
    input_size: Sequence[int] | None = None,
    seconds: float = 2.0,
    budget_ms: float | None = None,
    calibration: str | Path | None = None,
    time_limit_s: float = 600.0,
    progress: Progress | None = None,
) -> ParetoFront:
    """Measure models one after another, each in a process of its own, the cheapest first.

    An interruption (Ctrl-C) ends the measurement and keeps what was measured; `complete` is then
    False and `left_out` names the rest.

    Args:
        models: names, with or without tag, or patterns of them; None for every variant whose
            default weights have a published top-1.
        engine: an engine; ``auto`` for the fastest of each model, among those that start within
            20 s (``compile`` hardly ever does); or ``published`` for eager PyTorch as the authors
            wrote it.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``; the published top-1 is fp32's.
        input_size: (channels, height, width) or (height, width) for all; None for the size that
            each model's top-1 is published for.
        budget_ms: give a model up as soon as its warm-up takes three times as long as this.
        batch_size, threads, seconds, calibration, time_limit_s, progress: as for `benchmark`.

    Raises:
        KeyboardInterrupt: before anything was measured; otherwise as `benchmark`.
    """
    threads = torch.get_num_threads() if threads is None else threads
    conditions = Conditions(batch_size, threads, input_size, calibration)
    conditions.check([precision], seconds)
    if require_engine(engine, ("auto",)) == "published" and precision != "fp32":
        raise ConfigError(f"the published form is fp32, not {precision}; choose another engine")
    configuration = PUBLISHED
    if engine != "published":
        configuration = Configuration(engine, precision, "reparameterized")
    # Wrong names are told before anything is measured.
    specs = {name: specify_model(name, Path()) for name in _expand(models)}
    planned = []
    for name in specs:
        if progress is not None:
            progress(0.0, f"counting multiply-adds of {name}")
        planned.append(_facts(name, precision))
    planned.sort(key=lambda row: math.inf if row.macs is None else row.macs)
    machine = examine(threads, limit_s=time_limit_s)
    rows: list[ParetoRow] = []
    try:
        for number, row in enumerate(planned):
            with tempfile.TemporaryDirectory(prefix="backbones-bench-") as folder:
                spec = specs[row.model]
                job = conditions.at(row.top1_input_size).job(spec, configuration, Path(folder))
                found = measure_in_turns(
                    {row.model: job},
                    threads=threads,
                    seconds=seconds,
                    limit_s=time_limit_s,
                    stop=lambda facts: _hopeless(facts["warmup_ms"], budget_ms),
                    progress=progress and _part_of(progress, number, len(planned)),
                )
            row = dataclasses.replace(row, weights=spec.weights)
            rows.append(_with_times(row, found[row.model], threads))
    except KeyboardInterrupt:
        if not rows:
            raise
    return ParetoFront(
        engine=engine,
        precision=precision,
        batch_size=batch_size,
        machine=machine,
        rows=mark_front(rows),
        complete=len(rows) == len(planned),
        left_out=tuple(row.model for row in planned[len(rows) :]),
        problems=(*machine.problems, *(line for row in rows for line in row.problems)),
    )


def _part_of(progress: Progress, number: int, of: int) -> Progress:
    """Return what reports the progress of one of several parts as that of the whole."""
    return lambda share, what: progress((number + share) / of, what)


def _expand(models: Sequence[str] | None) -> list[str]:
    """Return the models that names and patterns stand for, each once, in order."""
    manifest = load_manifest()
    if isinstance(models, str):
        raise ConfigError(f"models is a list of names: [{models!r}]")
    if models is None:
        entries = ((name, manifest.find(name)) for name in list_models())
        return [name for name, entry in entries if entry is not None and entry.top1 is not None]
    found: list[str] = []
    for given in models:
        if not any(sign in given for sign in WILDCARDS):
            found.append(given)
            continue
        names = list_models(given) or [
            name for name in manifest.entries if fnmatch.fnmatch(name, given)
        ]
        if not names:
            raise UnknownModelError(f"no model matches {given!r}; `backbones list` shows all")
        found += names
    if not found:
        raise ConfigError("no models to measure; leave models out for all with a published top-1")
    return list(dict.fromkeys(found))


def _hopeless(warmup_ms: float, budget_ms: float | None) -> str | None:
    """Return why a model need not be measured further; None where it must be."""
    if budget_ms is None or warmup_ms <= HOPELESS * budget_ms:
        return None
    return f"given up: a call takes {warmup_ms:.4g} ms even in warm-up"


def _facts(name: str, precision: str) -> ParetoRow:
    """Return what is known of a model before it is measured."""
    variant, tag = find_variant(name)
    if variant is None:
        return ParetoRow(name, precision=precision)
    info, entry = model_info(name), load_manifest().find(variant.name, tag)
    row = ParetoRow(name, params=info.params, macs=info.macs, precision=precision)
    if entry is None:
        return row
    size = tuple(entry.input_size)
    return dataclasses.replace(row, tag=entry.tag, top1=entry.top1, top1_input_size=size)


def _with_times(row: ParetoRow, found: Measurement, threads: int) -> ParetoRow:
    facts, times = found.facts, found.times
    if facts:
        row = dataclasses.replace(
            row,
            params=facts["params"],
            macs=facts["macs"],
            input_size=tuple(facts["input_size"]),
            engine=facts["engine"],
            layout=facts["layout"],
        )
    if times is None:
        stopped = found.kind == STOPPED
        median = facts["warmup_ms"] if stopped else None
        return dataclasses.replace(row, median_ms=median, stopped=stopped, reason=found.reason)
    return dataclasses.replace(
        row,
        median_ms=times.median,
        p90_ms=times.p90,
        spread=times.spread,
        problems=tuple(found.problems(row.model, threads)),
    )
