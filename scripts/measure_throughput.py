"""Measures images a second: plain exports in the engines' best plain settings against ours.

python scripts/measure_throughput.py                 # ten models; half an hour or more
python scripts/measure_throughput.py lsnet_t --threads 2

The processor and its speed are named first. "Plain" is the published form, exported by PyTorch
without this package's help for batches of 1, 8 and 32: in ONNX Runtime with that many threads, and
in OpenVINO with its own hint for throughput and its queue of requests, in real float32. Ours is
`deploy(hint="throughput")` in the same engine. All settings of a model take turns in one process; a
ratio is the median of the ratios within each turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from measure_deploy import MODELS, onnx_session, plain_onnx

import backbones
from backbones.bench import examine
from backbones.engines import deploy_for_throughput
from backbones.errors import BackbonesError

BATCHES = (1, 8, 32)
ENGINES = ("onnxruntime", "openvino")
TURNS = 5
Measurement = Callable[[float], float]  # seconds -> images a second


def repeated(call: Callable[[], object], images: int) -> Measurement:
    """Return the images a second of one call after the other."""

    def measure(seconds: float) -> float:
        call()
        began, count = time.perf_counter(), 0
        while time.perf_counter() < began + seconds:
            call()
            count += 1
        return count * images / (time.perf_counter() - began)

    return measure


def queued(path: Path, x: np.ndarray, threads: int) -> Measurement:
    """Return the images a second of OpenVINO's own queue, as many requests as it likes."""
    import openvino

    options = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    queue = openvino.AsyncInferQueue(compiled)

    def measure(seconds: float) -> float:
        queue.start_async([x])
        queue.wait_all()
        began, count = time.perf_counter(), 0
        while time.perf_counter() < began + seconds:
            queue.start_async([x])
            count += 1
        queue.wait_all()
        return count * len(x) / (time.perf_counter() - began)

    return measure


def plain(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Measurement]:
    """Return what measures each plain setting of a model; what fails goes to stderr."""
    model = timm.create_model(name).eval()  # its own where it has the model, else ours
    found: dict[str, Measurement] = {}
    for batch in BATCHES:
        x = torch.randn(batch, 3, options.size, options.size)
        try:
            path = plain_onnx(model, x, folder / f"plain {name} {options.size} {batch}.onnx")
            session = onnx_session(path, options.threads)
            found[f"plain onnxruntime, {batch}"] = repeated(lambda s=session, x=x: s(x), batch)
            measure = queued(path, x.numpy(), options.threads)
            measure(0.0)
            found[f"plain openvino, {batch}"] = measure
        except Exception as error:
            print(f"  {name}: plain, {batch}: {type(error).__name__}", file=sys.stderr)
        print(f"  {name}: plain exports for {batch} are ready", file=sys.stderr)
    return found


def ours(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Measurement]:
    """Return what measures our settings of a model, and say which they are."""
    torch.manual_seed(0)  # so that a file of an earlier run is one of the same weights
    model = backbones.create_model(name).eval()
    found: dict[str, Measurement] = {}
    for engine in ENGINES:
        try:
            runner = deploy_for_throughput(
                model,
                engine=engine,
                threads=options.threads,
                input_size=(3, options.size, options.size),
                cache_dir=folder,
            )
        except BackbonesError as error:
            print(f"  {name}: {engine}: {error}", file=sys.stderr)
            continue
        print(f"  {name}: {runner.setting}", file=sys.stderr)
        found[f"ours {engine}"] = runner.images_per_second
    return found


def best(figures: dict[str, list[float]], start: str) -> str | None:
    """Return the setting with the most images a second of those whose names start so."""
    fit = {
        key: float(np.median(values)) for key, values in figures.items() if key.startswith(start)
    }
    return max(fit, key=lambda key: fit[key]) if fit else None


def cells(figures: dict[str, list[float]], engine: str) -> list[str]:
    """Return the best plain figure, ours, and the ratio of an engine."""
    pair = [best(figures, f"{kind} {engine}") for kind in ("plain", "ours")]
    texts = [f"{np.median(figures[key]):.1f}" if key else "-" for key in pair]
    if pair[0]:
        texts[0] += f" ({pair[0].split(', ')[1]})"
    if not all(pair):
        return [*texts, "-"]
    return [*texts, f"{np.median(np.divide(figures[str(pair[1])], figures[str(pair[0])])):.2f}x"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="default: ten models")
    parser.add_argument("--size", type=int, default=224, help="height and width (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn (%(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for files (default: none are kept)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(examine(options.threads), end="\n\n", flush=True)
    print("| model | plain ORT (batch) | ours | ratio | plain OV (batch) | ours | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
            folder = options.cache or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            forms = plain(name, options, folder) | ours(name, options, folder)
            figures: dict[str, list[float]] = {key: [] for key in forms}
            for _ in range(TURNS):
                for key, measure in forms.items():
                    figures[key].append(measure(options.seconds))
        row = [f"`{name}`", *cells(figures, "onnxruntime"), *cells(figures, "openvino")]
        print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
