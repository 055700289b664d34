"""Measures a training step: memory layouts, compilation, timm's class, and the memory it takes.

python scripts/measure_training.py                          # the smallest of every family
python scripts/measure_training.py convnext_atto --compile  # torch.compile beside it; minutes each

Forward and backward of 8 images of 160x160 (`--batch`, `--size`) in float32. The forms of a model
take turns in one process, and each figure is the median over rounds of the ratio to ours with
contiguous memory. Ours run as `backbones train` does, with its convolutions on CPUs; "plain loop"
is the same model without them, and "timm" timm's class of this name, where it has one. Memory is
what a step adds to a process of its own at its peak (Linux), without and with gradient
checkpointing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from measure_finetuning import smallest_members
from torch import nn

import backbones
from backbones import train
from backbones.bench import examine

LAST = torch.channels_last


def timms_class(name: str) -> nn.Module | None:
    """Return timm's own model of this name; None where it has none."""
    model = timm.create_model(name)
    return None if type(model).__module__.startswith("backbones") else model


def step_of(model: nn.Module, images: torch.Tensor, *, plain: bool = False) -> Callable[[], float]:
    """Return a training step that gives its seconds, as `backbones train` does it or `plain`."""
    model.train()
    convolutions = nullcontext() if plain else train.cpu_convolutions(model)

    def step() -> float:
        start = time.perf_counter()
        with convolutions:
            loss = model(images).float().square().mean()
        loss.backward()
        seconds = time.perf_counter() - start
        model.zero_grad()
        return seconds

    return step


def measure(name: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each form, round by round."""
    images = torch.randn(options.batch, 3, options.size, options.size)
    forms: dict[str, Any] = {"contiguous": step_of(backbones.create_model(name), images)}
    twin = backbones.create_model(name).to(memory_format=LAST)
    last = images.contiguous(memory_format=LAST)
    forms["channels last"] = step_of(twin, last)
    forms["plain loop"] = step_of(backbones.create_model(name), images, plain=True)
    theirs = timms_class(name)
    if theirs is not None:
        forms["timm"] = step_of(theirs, images, plain=True)
        theirs = timms_class(name).to(memory_format=LAST)  # type: ignore[union-attr]
        forms["timm channels last"] = step_of(theirs, last, plain=True)
    if options.compile:
        compiled: Any = torch.compile(backbones.create_model(name))
        forms["compiled"] = step_of(compiled, images, plain=True)
    for step in forms.values():
        step()
    times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(options.rounds):
        for form, step in forms.items():
            times[form].append(step())
    return times


def peak_memory(name: str, options: argparse.Namespace, *, form: str) -> float | None:
    """Return the megabytes that a step adds, in a process of its own; None where it fails."""
    command = [sys.executable, __file__, name, "--form", form, "--batch", str(options.batch)]
    command += ["--size", str(options.size), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} {form}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return float(done.stdout)


def print_added_memory(name: str, options: argparse.Namespace) -> None:
    """Print the megabytes that two steps add to this process at their peak."""
    model = timms_class(name) if options.form == "timm" else backbones.create_model(name)
    assert model is not None
    if options.form == "checkpointing":
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    images = torch.randn(options.batch, 3, options.size, options.size)
    step = step_of(model, images, plain=options.form == "timm")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
    before = _kilobytes("VmRSS")
    for _ in range(2):
        step()
    print((_kilobytes("VmHWM") - before) / 1024)


def _kilobytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="default: the smallest of every family")
    parser.add_argument("--batch", type=int, default=8, help="images a step (%(default)s)")
    parser.add_argument("--size", type=int, default=160, help="pixels a side (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.form:
        print_added_memory(options.models[0], options)
        return
    print(examine(options.threads), end="\n\n", flush=True)
    names = ["channels last", "plain loop", "timm", "timm channels last"]
    names += ["compiled"] * options.compile
    print(
        "| model | contiguous (ms) |",
        " | ".join(names),
        "| memory (MB): ours | checkpointing | timm |",
    )
    print("|" + "---|" * (len(names) + 5), flush=True)
    for name in options.models or smallest_members():
        times = measure(name, options)
        base = times["contiguous"]
        cells = [f"{statistics.median(base) * 1e3:.0f}"]
        for form in names:
            ratios = [seconds / ours for seconds, ours in zip(times.get(form, []), base)]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        for form in ("plain", "checkpointing", *(["timm"] if "timm" in times else [])):
            memory = peak_memory(name, options, form=form)
            cells.append("" if memory is None else f"{memory:.0f}")
        cells += [""] * (len(names) + 4 - len(cells))
        print(f"| `{name}` |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
