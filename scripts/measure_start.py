"""Measures how soon a process is ready: imports, the command line, a deployed model from the cache.

python scripts/measure_start.py                       # three models
python scripts/measure_start.py lsnet_t --threads 2

Each figure is the median over processes of their own, in seconds. A model is deployed once before,
so that its files are there, and then from `import backbones` on to the first answer for one image
of 224x224: the model is created with random weights, its file found by its content and loaded.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from backbones.bench import examine

MODELS = "lsnet_t unireplknet_a convnext_tiny".split()
ENGINES = "onnxruntime openvino".split()

IMPORTS = """
import time
start = time.perf_counter()
import timm
between = time.perf_counter()
import backbones
print(between - start, time.perf_counter() - between)
"""

ANSWER = """
import sys, time
import torch
import backbones
start = time.perf_counter()
name, engine, threads, folder = sys.argv[1:]
torch.manual_seed(0)
model = backbones.create_model(name).eval()
runner = backbones.deploy(
    model, engine=engine, threads=int(threads), input_size=(3, 224, 224), cache_dir=folder
)
runner(torch.zeros(1, 3, 224, 224))
print(time.perf_counter() - start)
"""


def seconds_of(code: str, *arguments: str, rounds: int) -> list[float]:
    """Return the medians of the numbers that a program prints."""
    command = [sys.executable, "-c", code, *arguments]
    printed = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for _ in range(rounds)
    ]
    return [statistics.median(column) for column in zip(*(map(float, p.split()) for p in printed))]


def whole(command: list[str], rounds: int) -> float:
    """Return the median time of a command."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(examine(options.threads), end="\n\n", flush=True)
    print("| from start | seconds |\n|---|---|", flush=True)
    timm, ours = seconds_of(IMPORTS, rounds=options.rounds)
    print(f"| `import timm` | {timm:.2f} |")
    print(f"| `import backbones` after it | {ours:.2f} |")
    for command in ("--help", "list", "info lsnet_t"):
        line = [sys.executable, "-m", "backbones", *command.split()]
        print(f"| `backbones {command}` | {whole(line, options.rounds):.2f} |", flush=True)
    for name in options.models or MODELS:
        for engine in ENGINES:
            with tempfile.TemporaryDirectory() as folder:
                given = (name, engine, str(options.threads), folder)
                (first,) = seconds_of(ANSWER, *given, rounds=1)
                (later,) = seconds_of(ANSWER, *given, rounds=options.rounds)
            print(
                f"| `{name}` in {engine}, the first time | {first:.2f} |\n"
                f"| `{name}` in {engine}, from the cache | {later:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
