"""deploy(): the fastest form of a model on this machine, as one callable."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from backbones.engines.caching import read_choice, write_choice
from backbones.engines.exporting import AGREEMENT
from backbones.engines.preparation import (
    PRECISIONS,
    Images,
    random_input,
)
from backbones.engines.requesting import add_facts, request_of
from backbones.engines.runners import Deployment, Runner, notes_on
from backbones.engines.targets import ENGINES
from backbones.engines.throughput import StreamedRunner, deploy_for_throughput
from backbones.engines.timing import take_turns
from backbones.engines.verification import Agreement, as_list, compare, run_model
from backbones.errors import BackbonesError, ConfigError

__all__ = ["Candidate", "DeployReport", "deploy"]

TIME_LIMIT = 180.0
HINTS = ("latency", "throughput")


@dataclass(frozen=True)
class Candidate:
    """An engine and precision that was tried.

    `median_ms` is None where it did not run, and `reason` then says why; a candidate with both ran
    and is not to be chosen. `agreement` is with the model in float32; `notes` are those of `export`
    on the engine's file, such as the layers that int8 leaves in float32.
    """

    engine: str
    precision: str
    layout: str = ""
    median_ms: float | None = None
    p90_ms: float | None = None
    agreement: Agreement | None = None
    reason: str | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class DeployReport:
    """What was tried, what was chosen, and where the files are.

    `remembered` tells that candidates were measured at an earlier time; `real_images` that
    agreement was measured on the user's images.
    """

    engine: str
    precision: str
    candidates: tuple[Candidate, ...]
    folder: Path
    remembered: bool
    real_images: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**dataclasses.asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        lines = []
        for one in sorted(self.candidates, key=lambda c: c.median_ms or float("inf")):
            what = f"{one.engine} {one.precision}"
            if one.median_ms is None:
                lines.append(f"  {what}: {one.reason}")
                continue
            text = f"  {what}: {one.median_ms:.2f} ms (p90 {one.p90_ms:.2f} ms)"
            if one.agreement is not None:
                text += f", {one.agreement.in_words}"
            if "layers_in_float32" in one.notes:
                text += f", {len(one.notes['layers_in_float32'])} of {one.notes['layers']} layers"
                text += f" in {'bf16' if one.notes.get('rest') == 'bf16' else 'float32'}"
            lines.append(text + (f"; {one.reason}" if one.reason else ""))
        return "\n".join([f"chosen: {self.engine} {self.precision}", *lines])


def deploy(
    model: nn.Module,
    *,
    engine: str | Sequence[str] = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    input_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    hint: str = "latency",
    calibration: Images | None = None,
    agreement: float = AGREEMENT,
    cache_dir: str | PathLike[str] | None = None,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] | None = None,
) -> Runner:
    """Return a model as a callable that is fast here: merged, laid out, in the engine that wins.

    With ``hint="throughput"`` images a second count rather than the soonest answer: engine, batch
    size, streams and threads are chosen by measurement, and a call cuts its images into batches
    that run side by side.

    ``auto`` starts every installed engine, lets them take turns, takes the one with the lowest
    median. fp32 is fp32: no engine may lower it. Files of engines, and what was measured, are kept
    by the content of the model: the next process loads the file, and neither merges nor measures.

    Args:
        model: images (B, C, H, W) to logits; stays as it is. Of a wrapper (compiled, data parallel,
            averaged) the model that it holds.
        engine: ``onnxruntime``, ``openvino``, ``eager``, ``ncnn``, ``litert``, ``executorch``
            or ``compile``; several of them to choose from; or ``auto`` for all that are installed.
        precision: ``fp32``, ``bf16``, ``fp16``, ``int8``; or ``auto``: the fastest of those that
            name the same class as fp32 for at least `agreement` of `calibration`.
        threads: threads of one call; None for PyTorch's number.
        input_size: ([channels,] height, width) to measure and calibrate at; None for the model's.
        batch_size: images of a call to measure at; other numbers work too. None for 1, or for the
            best with ``hint="throughput"``.
        hint: ``latency`` or ``throughput``.
        calibration: real images: a folder, or a normalized batch (N, C, H, W). int8 and ``auto``
            precision need them; others report agreement on them instead of on random images.
        agreement: the share (0 to 1) of them whose class int8 shall keep (see `export`), and any
            candidate of ``auto`` must; 0 takes what is fastest.
        cache_dir: where files are kept; None for ``backbones/engines`` in PyTorch's cache.
        time_limit: seconds after which ``auto`` starts no further engine; none is interrupted.
        progress: takes a line before each engine.

    Returns:
        A runner, warm; ``runner.report`` is a :class:`DeployReport`, or the :class:`Setting` for
        throughput. It may be called from several threads, and takes tensors and arrays.

    Raises:
        UnsupportedError: no such engine, or it cannot do this precision.
        MissingDependencyError: the engine's package is not installed.
        ConfigError: no such precision, hint or input size, images are missing, or ``auto`` found no
            engine.
        ExportError: the model cannot be converted, or does not compute the same there.
    """
    if hint not in HINTS:
        raise ConfigError(f"no hint {hint!r}; there are {', '.join(HINTS)}")
    if hint == "throughput":
        found = deploy_for_throughput(
            model,
            engine=engine,
            precision=precision,
            threads=threads,
            batch_size=batch_size,
            input_size=input_size,
            calibration=calibration,
            agreement=agreement,
            cache_dir=cache_dir,
            progress=progress,
        )
        return StreamedRunner(found)
    batch_size = 1 if batch_size is None else batch_size
    names, deployment = request_of(
        model, engine, precision, threads, input_size, batch_size, calibration, cache_dir, agreement
    )
    request = {
        "engines": names,
        "precision": precision,
        "threads": deployment.threads,
        "batch_size": batch_size,
        "agreement": agreement,
        "labels": None if deployment.labels is None else deployment.labels.tolist(),
    }
    several = len(names) > 1 or precision == "auto"
    if earlier := read_choice(deployment.folder, request):
        chosen, report = _as_before(deployment, earlier)
    else:
        precisions = PRECISIONS if precision == "auto" else (precision,)
        wanted = {
            (name, p): dataclasses.replace(deployment, precision=p)
            for p in precisions
            for name in names
        }
        say = progress or (lambda line: None)
        runners, not_started = _started(wanted, several, say, time_limit)
        say(f"measuring {len(runners)} candidates")
        candidates = _measured(runners, deployment, several)
        best = _fastest(candidates, several)
        chosen = runners[best.engine, best.precision]
        report = DeployReport(
            engine=best.engine,
            precision=best.precision,
            candidates=(*candidates, *not_started),
            folder=deployment.folder,
            remembered=False,
            real_images=deployment.images is not None,
        )
        write_choice(deployment.folder, request, report.as_dict())
    chosen.report = report
    add_facts(chosen, model, deployment.size)
    for _ in range(3):
        chosen(deployment.example)
    return chosen


Runners = dict[tuple[str, str], Runner]  # by engine and precision


def _started(
    wanted: dict[tuple[str, str], Deployment],
    several: bool,
    say: Callable[[str], None],
    time_limit: float,
) -> tuple[Runners, list[Candidate]]:
    """Start engines, and say why others did not start."""
    began = time.perf_counter()
    runners: Runners = {}
    others: list[Candidate] = []
    for (name, precision), deployment in wanted.items():
        engine = ENGINES[name]
        if several and precision not in engine.precisions:
            continue
        spent = time.perf_counter() - began
        if several and runners and spent > (time_limit / 2 if engine.slow else time_limit):
            reason = f"not tried, the time limit of {time_limit:.0f} s was near"
            others.append(Candidate(name, precision, reason=reason))
            continue
        say(f"starting {name} in {precision}")
        try:
            runners[name, precision] = engine.start(deployment)
        except BackbonesError as error:
            if not several:
                raise
            others.append(Candidate(name, precision, reason=str(error)))
    if not runners:
        reasons = "; ".join(f"{one.engine}: {one.reason}" for one in others)
        raise ConfigError(f"no engine can run this model in the precision asked for: {reasons}")
    return runners, others


def _measured(runners: Runners, deployment: Deployment, several: bool) -> list[Candidate]:
    """Let runners take turns, and compare what they compute with the model."""
    named = {" ".join(key): runner for key, runner in runners.items()}
    times = take_turns(named, deployment.example, warmup_s=0.2, seconds=1.0)
    images = deployment.images
    if images is None:
        images = random_input((8, *deployment.size))
    expected = run_model(deployment.model, images)
    candidates = []
    for key, runner in runners.items():
        values = [ms for turn in times[" ".join(key)] for ms in turn]
        parts = [as_list(runner(part)) for part in images.split(8)]
        agreement, problem = None, None
        try:
            outputs = [torch.cat(one) for one in zip(*parts)]
            agreement = compare(expected, outputs, deployment.labels)
        except BackbonesError as error:
            problem = str(error)
        if agreement is not None and agreement.top1_agreement < deployment.agreement and several:
            # On random images classes lie close together, and only fp32 is compared on them.
            least = 100 * deployment.agreement
            problem = f"names the class of fp32 for less than {least:g}% of images"
        candidates.append(
            Candidate(
                *key,
                layout=runner.layout,
                median_ms=float(np.median(values)),
                p90_ms=float(np.percentile(values, 90)),
                agreement=agreement,
                reason=problem,
                notes=notes_on(runner),
            )
        )
    return candidates


def _fastest(candidates: Sequence[Candidate], several: bool) -> Candidate:
    """Return the fastest of those that compute what the model computes."""
    fit = [one for one in candidates if one.reason is None or not several]
    if not fit:
        raise ConfigError(f"no candidate agrees with the model: {list(candidates)}")
    return min(fit, key=lambda one: one.median_ms or 0.0)


def _as_before(deployment: Deployment, earlier: dict[str, Any]) -> tuple[Runner, DeployReport]:
    """Start what was chosen at an earlier time."""
    candidates = []
    for one in earlier["candidates"]:
        agreement = one["agreement"]
        if agreement is not None:
            agreement = Agreement(**{**agreement, "worst": tuple(agreement["worst"])})
        candidates.append(Candidate(**{**one, "agreement": agreement}))
    report = DeployReport(
        engine=earlier["engine"],
        precision=earlier["precision"],
        candidates=tuple(candidates),
        folder=deployment.folder,
        remembered=True,
        real_images=earlier["real_images"],
    )
    deployment = dataclasses.replace(deployment, precision=earlier["precision"])
    return ENGINES[earlier["engine"]].start(deployment), report
