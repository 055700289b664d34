"""benchmark(): one model, in every way that this machine can run it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones.bench.configurations import PUBLISHED, Conditions, list_configurations
from backbones.bench.machine import examine
from backbones.bench.measuring import Progress, measure_in_turns
from backbones.bench.model_spec import specify_model
from backbones.bench.report import BenchReport, row_of, verdict_on
from backbones.errors import MissingDependencyError

__all__ = ["benchmark"]


def benchmark(
    model: nn.Module | str | Path | None,
    *,
    checkpoint: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    engines: Sequence[str] | None = None,
    precisions: Sequence[str] = ("fp32",),
    batch_size: int = 1,
    threads: int | None = None,
    input_size: Sequence[int] | None = None,
    seconds: float = 2.0,
    calibration: str | Path | None = None,
    time_limit_s: float = 600.0,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure a model in several engines and precisions, against the form its authors wrote.

    Every configuration runs in a process of its own, and they take turns. The first is always the
    published form: eager PyTorch, not re-parameterized, operators by their reference; speedups
    refer to it. Memory must suffice for all models at once. A family that was registered in this
    process alone is not found by others.

    Args:
        model: a name, a checkpoint, or a module of this package (or timm's own instance of one of
            its models); None for the model that `checkpoint` is of. A name is measured with random
            weights unless its released ones are on this machine; time does not depend on them.
        checkpoint: weights for the model named.
        overrides: further arguments of `create_model`, such as ``num_classes``.
        engines: of ``eager``, ``compile``, ``onnxruntime``, ``openvino``, ``ncnn``, ``litert``
            and ``executorch``; None for those that are installed; ``["published"]`` for none.
        precisions: of ``fp32``, ``bf16``, ``fp16`` and ``int8``. What an engine cannot do is a row
            with the reason.
        batch_size: images a call.
        threads: threads of a call; None for PyTorch's number.
        input_size: (channels, height, width) or (height, width); None for the model's own.
        seconds: timed seconds of each configuration.
        calibration: folder of images, for int8.
        time_limit_s: seconds that loading or a turn may take before the process is given up.
        progress: called with the share done (0 to 1) and what is being done.

    Raises:
        ConfigError: an unknown engine or precision, a number out of range, or a missing file.
        UnknownModelError: no such model.
        UnsupportedError: a module that is not of this package.
        MissingDependencyError: an engine that was named is not installed.
        ChildError: the machine's own speed could not be measured.
    """
    threads = torch.get_num_threads() if threads is None else threads
    conditions = Conditions(batch_size, threads, input_size, calibration)
    conditions.check(precisions, seconds)
    configurations = list_configurations(engines, precisions)
    with tempfile.TemporaryDirectory(prefix="backbones-bench-") as folder:
        spec = specify_model(model, Path(folder), checkpoint=checkpoint, overrides=overrides)
        if progress is not None:
            progress(0.0, "measuring matrix products")
        kinds = ["fp32", "bf16"] if "bf16" in precisions else ["fp32"]
        machine = examine(threads, kinds, limit_s=time_limit_s)
        found = measure_in_turns(
            {str(c): conditions.job(spec, c, Path(folder)) for c in configurations},
            threads=threads,
            seconds=seconds,
            limit_s=time_limit_s,
            progress=progress,
        )
    for name, one in found.items() if engines is not None else ():
        # Only starting an engine shows what else it lacks.
        if one.kind == MissingDependencyError.__name__ and name != str(PUBLISHED):
            raise MissingDependencyError(f"{name}: {one.reason}")
    times = {name: one.times for name, one in found.items() if one.times is not None}
    baseline = times.get(str(configurations[0]))
    # Every worker counts the same model, so any will do.
    facts: Mapping[str, Any] = next((one.facts for one in found.values() if one.facts), {})
    macs = facts.get("macs")
    verdict, conclusive = verdict_on(times)
    return BenchReport(
        model=spec.name,
        weights=spec.weights,
        params=facts.get("params"),
        macs=macs,
        batch_size=batch_size,
        input_size=tuple(facts["input_size"]) if facts else None,
        machine=machine,
        rows=tuple(
            row_of(c, found[str(c)], baseline, macs, batch_size, machine) for c in configurations
        ),
        verdict=verdict,
        conclusive=conclusive,
        problems=(
            *machine.problems,
            *(line for name, one in found.items() for line in one.problems(name, threads)),
        ),
    )
