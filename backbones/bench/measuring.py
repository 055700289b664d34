"""Worker processes that take turns."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from backbones.bench.child import WORKER, Child, ChildError
from backbones.bench.machine import n_threads
from backbones.bench.statistics import NOISY, Times

__all__ = ["ROUNDS", "STOPPED", "Measurement", "Progress", "measure_in_turns"]

# Enough for the sign test of `backbones.bench.statistics`: two rounds of twelve may go astray.
ROUNDS = 12
CALLS = 2  # timed calls of a turn, at least
BUSY_WHILE_IDLE = 0.25  # of a processor
STOPPED = "stopped"  # the kind of a measurement that `stop` ended

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and what is being done."""


@dataclass
class Measurement:
    """What is known of one configuration; `reason` says why there are no times, or no more."""

    facts: dict[str, Any] = field(default_factory=dict)
    turns: list[list[float]] = field(default_factory=list)
    reason: str | None = None
    kind: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    idle_s: float = 0.0
    idle_cpu_s: float = 0.0
    peak_mib: float | None = None

    @property
    def times(self) -> Times | None:
        """The times; None where it was not measured to the end."""
        return Times(self.turns) if self.turns and self.reason is None else None

    def add(self, turn: Mapping[str, Any]) -> None:
        """Add a turn, as a worker reports it."""
        self.turns.append(turn["ms"])
        self.wall_s += turn["wall_s"]
        self.cpu_s += turn["cpu_s"]
        self.idle_s += turn["idle_s"]
        self.idle_cpu_s += turn["idle_cpu_s"]

    def problems(self, name: str, threads: int) -> list[str]:
        """Return what makes the figures doubtful, as sentences."""
        found = []
        for key, whose in (("threads", "PyTorch"), ("engine_threads", "its engine")):
            granted = self.facts.get(key, threads)
            if granted != threads:
                found.append(f"{name}: asked for {n_threads(threads)}, {whose} uses {granted}")
        if self.facts.get("cpus", threads) < threads:
            found.append(
                f"{name}: {n_threads(threads)}, but only {self.facts['cpus']} CPUs for them"
            )
        if self.idle_s > 0.2 and self.idle_cpu_s > BUSY_WHILE_IDLE * self.idle_s:
            found.append(
                f"{name}: its process kept {self.idle_cpu_s / self.idle_s:.1f} processors busy"
                " while others had their turn, and slowed them down"
            )
        if (times := self.times) is not None and times.spread > NOISY:
            found.append(
                f"{name}: calls spread by {times.spread:.0%}, so its figures are rough; close other"
                " programs or measure longer"
            )
        return found


def measure_in_turns(
    jobs: Mapping[str, dict[str, Any]],
    *,
    threads: int,
    seconds: float,
    limit_s: float = 600.0,
    stop: Callable[[Mapping[str, Any]], str | None] | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = WORKER,
) -> dict[str, Measurement]:
    """Measure configurations or models, each in a process of its own, one turn each in every round.

    Only one process works at a time. One that fails, dies or hangs is left with its reason, and
    the others go on. Every process is gone when this returns or raises.

    Args:
        jobs: what each worker is to load, by its name.
        threads: threads of each.
        seconds: timed seconds of each, spread over the rounds.
        limit_s: seconds that any one reply may take.
        stop: called once with the facts of each that is loaded: a reason not to go on, or None.
        progress, command: see `Progress` and `Child`.
    """
    found = {name: Measurement() for name in jobs}
    steps, done = len(jobs) * (2 + ROUNDS), 0
    running: dict[str, Child] = {}
    with ExitStack() as stack:

        def request(name: str, message: Mapping[str, Any], what: str) -> dict[str, Any] | None:
            nonlocal done
            if progress is not None:
                progress(done / steps, f"{what} {name}")
            done += 1
            try:
                return running[name].request(message)
            except ChildError as error:
                found[name].reason, found[name].kind = str(error), error.kind
                running.pop(name).close()
                return None

        for name, job in jobs.items():
            child = Child(name, threads=threads, limit_s=limit_s, command=command)
            running[name] = stack.enter_context(child)
            facts = request(name, job, "loading")
            if facts is None:
                continue
            found[name].facts = facts
            if stop is not None and (reason := stop(facts)):
                found[name].reason, found[name].kind = reason, STOPPED
                running.pop(name).close()
        turn = {"do": "turn", "seconds": seconds / ROUNDS, "calls": CALLS}
        for _ in range(ROUNDS):
            for name in list(running):
                if (reply := request(name, turn, "measuring")) is not None:
                    found[name].add(reply)
        for name in list(running):
            if (reply := request(name, {"do": "end"}, "ending")) is not None:
                found[name].peak_mib = reply["peak_mib"]
                running[name].leave()
    return found
