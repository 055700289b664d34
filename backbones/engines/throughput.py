"""The setting of an engine that gives the most images a second, rather than the soonest answer."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from backbones.engines.caching import read_choice, write_choice
from backbones.engines.exporting import AGREEMENT
from backbones.engines.preparation import PRECISIONS, Images, random_input
from backbones.engines.requesting import add_facts, request_of
from backbones.engines.runners import Deployment, Runner
from backbones.engines.targets import ENGINES, available_engines
from backbones.engines.verification import TOLERANCE, as_list, compare, run_model
from backbones.errors import BackbonesError, ConfigError, ExportError

__all__ = [
    "Setting",
    "StreamedRunner",
    "ThroughputRunner",
    "deploy_for_throughput",
    "throughput_engines",
]

_FIRST_BATCH = 8  # engines are compared at it
_BATCHES = (1, 2, 4, 16, 32)
_SECONDS = 0.5  # of a measurement
_LONGEST = 2.0  # seconds of a call, beyond which larger batches are not tried
# What else runs on the machine slows some measurements, so the fastest settings take turns.
_FINALISTS = 3
_TURNS = 3
# Made for phones: threads are the process's, or calls take turns and a file has one batch size.
_PASSED_OVER = ("executorch", "litert", "ncnn")


@dataclass(frozen=True)
class Setting:
    """How an engine runs: `streams` calls side by side, of `threads` and `batch_size` images each.

    `images_per_second` is what was measured here, None if it was not.
    """

    engine: str
    precision: str
    batch_size: int
    streams: int
    threads: int
    images_per_second: float | None = None

    def __str__(self) -> str:
        return (
            f"{self.engine} {self.precision}, batches of {self.batch_size},"
            f" {self.streams} x {self.threads} threads"
        )


@dataclass(frozen=True)
class ThroughputRunner:
    """A runner, to be called from as many threads as the setting has streams.

    `key` is a digest of the model's weights, structure and code; `size` is that of the images,
    (C, H, W).
    """

    runner: Runner
    setting: Setting
    key: str
    size: tuple[int, ...]

    def images_per_second(self, seconds: float) -> float:
        """Measure all streams for some seconds, after one call of each."""
        return _measured(self.runner, self.size, self.setting, seconds)


class StreamedRunner(Runner):
    """Any number of images a call: batches of them run side by side, as the setting says."""

    def __init__(self, found: ThroughputRunner) -> None:
        inner, setting = found.runner, found.setting
        super().__init__(
            inner.what,
            inner.shape,
            threads=setting.threads * setting.streams,
            raw=inner.raw,
            metadata=inner.metadata,
        )
        self.engine, self.layout, self.precision = inner.engine, inner.layout, inner.precision
        self.report = setting
        self._inner, self._batch_size = inner, setting.batch_size
        self._streams = ThreadPoolExecutor(setting.streams)

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run all batches; the last one may be smaller."""
        parts = [*self._streams.map(self._inner, x.split(self._batch_size))]
        return [torch.cat(outputs) for outputs in zip(*map(as_list, parts))]


def deploy_for_throughput(
    model: nn.Module,
    *,
    engine: str | Sequence[str] = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    batch_size: int | None = None,
    setting: Setting | None = None,
    input_size: Sequence[int] | None = None,
    calibration: Images | None = None,
    agreement: float = AGREEMENT,
    cache_dir: str | PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ThroughputRunner:
    """Return a model in the engine, batch size, streams and threads that do most images a second.

    Engines are compared by a short measurement at one batch size, then batch sizes and streams in
    the best of them, and the fastest again in turns; the choice is remembered. ``auto`` leaves out
    engines that take minutes.

    Args:
        model: images (B, C, H, W) to an output; stays as it is.
        engine: as for `deploy`.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        threads: of all streams together; None for PyTorch's number.
        batch_size: images of a call; None for the best.
        setting: to be taken as it is, such as one of another process.
        input_size, calibration, agreement, cache_dir, progress: as for `deploy`.

    Raises:
        BackbonesError: as for `deploy`.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if setting is not None:
        engine, precision = setting.engine, setting.precision
    first = batch_size or _FIRST_BATCH
    names, deployment = request_of(
        model, engine, precision, threads, input_size, first, calibration, cache_dir, agreement
    )
    key = deployment.folder.name
    if engine == "auto":
        names = throughput_engines()
    request = {
        "throughput": names,
        "precision": precision,
        "threads": deployment.threads,
        "batch_size": batch_size,
        "agreement": agreement,
    }
    if setting is None and (found := read_choice(deployment.folder, request)):
        setting = Setting(**found)
    if setting is not None:
        runner = _start(deployment, setting)
    else:
        runner, setting = _search(deployment, names, batch_size, progress or (lambda line: None))
        write_choice(deployment.folder, request, dataclasses.asdict(setting))
    add_facts(runner, model, deployment.size)
    return ThroughputRunner(runner, setting, key, deployment.size)


def throughput_engines() -> list[str]:
    """Return the installed engines that ``auto`` chooses from when images a second count."""
    names = available_engines()
    return [name for name in names if not ENGINES[name].slow and name not in _PASSED_OVER]


def _search(
    deployment: Deployment, names: Sequence[str], batch_size: int | None, say: Callable[[str], None]
) -> tuple[Runner, Setting]:
    cores, precision = deployment.threads, deployment.precision
    first = [
        Setting(name, precision, deployment.batch_size, streams, cores // streams)
        for name in names
        for streams in ((cores, 1) if name != "eager" and cores > 1 else (1,))
    ]
    problems: list[str] = []
    found = _fastest(deployment, first, say, problems)
    if not found:
        raise ConfigError(f"no engine can run this model: {'; '.join(problems)}")
    if batch_size is None:
        best = found[0][1]
        found = [one for one in found if one[1].engine == best.engine]
        others = [
            dataclasses.replace(setting, batch_size=size)
            for setting in first
            if setting.engine == best.engine
            for size in _BATCHES
            if size == 1 or size * setting.streams <= _LONGEST * (best.images_per_second or 0.0)
        ]
        found = _fastest(deployment, others, say, problems, found)
    return found[0]


def _fastest(
    deployment: Deployment,
    settings: Sequence[Setting],
    say: Callable[[str], None],
    problems: list[str],
    before: Sequence[tuple[Runner, Setting]] = (),
) -> list[tuple[Runner, Setting]]:
    """Return the few fastest of these settings and those found before, the fastest first.

    Those that cannot run, or do not compute what the model computes, leave a word in `problems`.
    """
    found = [*before]
    for setting in settings:
        say(f"measuring {setting}")
        try:
            runner = _start(deployment, setting)
            _check(deployment, runner, setting)
        except BackbonesError as error:
            problems.append(f"{setting.engine}: {error}")
            continue
        found.append(_measured_again(deployment, runner, setting))
        found = _in_order(found)[:_FINALISTS]
    for turn in range(_TURNS if len(found) > 1 else 0):
        say(f"measuring the fastest {len(found)} settings, turn {turn + 1} of {_TURNS}")
        found = [_measured_again(deployment, *one) for one in found]
    return _in_order(found)


def _measured_again(
    deployment: Deployment, runner: Runner, setting: Setting
) -> tuple[Runner, Setting]:
    """Return a setting with the most images a second of all times that it was measured."""
    now = _measured(runner, deployment.size, setting, _SECONDS)
    most = max(now, setting.images_per_second or 0.0)
    return runner, dataclasses.replace(setting, images_per_second=most)


def _in_order(found: Sequence[tuple[Runner, Setting]]) -> list[tuple[Runner, Setting]]:
    return sorted(found, key=lambda one: one[1].images_per_second or 0.0, reverse=True)


def _start(deployment: Deployment, setting: Setting) -> Runner:
    return ENGINES[setting.engine].start(
        dataclasses.replace(
            deployment,
            precision=setting.precision,
            batch_size=setting.batch_size,
            streams=setting.streams,
            threads=setting.threads,
        )
    )


def _check(deployment: Deployment, runner: Runner, setting: Setting) -> None:
    """Refuse a runner that does not give what the model gives."""
    x = deployment.images
    x = random_input((_FIRST_BATCH, *deployment.size)) if x is None else x
    error = compare(run_model(deployment.model, x), runner(x)).relative_error
    if error > TOLERANCE[setting.precision]:
        raise ExportError(f"does not compute what the model computes (relative error {error:.1e})")


def _measured(runner: Runner, size: tuple[int, ...], setting: Setting, seconds: float) -> float:
    """Return the images a second of a setting, after one call of each stream."""
    x = random_input((setting.batch_size, *size))

    def calls(seconds: float) -> int:
        end, count = time.perf_counter() + seconds, 0
        while count == 0 or time.perf_counter() < end:
            runner(x)
            count += 1
        return count

    with ThreadPoolExecutor(setting.streams) as pool:
        list(pool.map(calls, [0.0] * setting.streams))
        began = time.perf_counter()
        done = sum(pool.map(calls, [seconds] * setting.streams))
        return done * setting.batch_size / (time.perf_counter() - began)
