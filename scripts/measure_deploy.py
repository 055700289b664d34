"""Measures what deployment gains: the published form in the usual engines against `deploy`.

python scripts/measure_deploy.py                             # ten models, fp32; ten minutes or more
python scripts/measure_deploy.py lsnet_t --precisions fp32 int8 --compile
python scripts/measure_deploy.py --engines onnxruntime       # our ONNX file against a plain one

One image of 224x224 (or `--size`), in milliseconds; all forms of a model take turns in one process.
The processor and its speed are named first.
Milliseconds are medians of all calls. A ratio is the median of the ratios within each turn, because
the speed of a shared machine changes from turn to turn; each turn begins with calls that are not
counted, until caches and idle threads have settled. Forms more than four times slower than the
fastest are measured after the others.
"Plain" is what a user gets without this package's help: timm's class where timm has the model,
else ours un-merged with reference operators; NCHW; PyTorch's ONNX exporter and the engines' default
options but for the number of threads, in real float32. A form that fails says so.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import backbones
from backbones import ops
from backbones.bench import Times, examine
from backbones.engines import Runner, take_turns, timed
from backbones.errors import BackbonesError

MODELS = (
    "cpubone_s0 cpubone_b3 lsnet_t unireplknet_a hornet_tiny_7x7 hornet_tiny_gf spartan_t"
    " overlock_xt inception_next_atto convnext_tiny"
).split()
ENGINES = ("onnxruntime", "openvino", "eager")


def plain_forms(
    model: nn.Module, x: Tensor, path: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Return callables by name; a string where a form cannot be made."""
    forms: dict[str, Any] = {}

    def in_reference(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(images: Tensor) -> Tensor:
            with ops.use_reference():
                return module(images)

        return call

    forms["eager"] = in_reference(model)
    last = torch.channels_last
    twin = copy.deepcopy(model).to(memory_format=last)  # type: ignore[call-overload]
    call_last = in_reference(twin)
    forms["eager channels_last"] = lambda images: call_last(images.contiguous(memory_format=last))
    try:
        plain_onnx(model, x, path)
    except Exception as error:
        reason = f"{type(error).__name__}"
        return {**forms, "onnxruntime": reason, "openvino": reason}
    forms["onnxruntime"] = onnx_session(path, options.threads)
    try:
        forms["openvino"] = openvino_request(path, options.threads)
        forms["openvino"](x)
    except Exception as error:
        forms["openvino"] = f"{type(error).__name__}"
    return forms


def plain_onnx(model: nn.Module, x: Tensor, path: Path) -> Path:
    """Write a plain ONNX file for batches like this one, unless it is there."""
    if path.is_file():
        return path
    with ops.use_reference():
        program = torch.onnx.export(model, (x,), dynamo=True, input_names=["input"], verbose=False)
    assert program is not None
    program.save(path.with_suffix(".part"))
    return path.with_suffix(".part").rename(path)


def onnx_session(path: Path, threads: int) -> Callable[[Tensor], Any]:
    """Return an ONNX Runtime session with its default options."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"input": images.numpy()})


def openvino_request(path: Path, threads: int) -> Callable[[Tensor], Any]:
    """Return OpenVINO's model with its default options, in real float32."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda images: compiled(images.numpy())


def calibration_images(size: tuple[int, ...]) -> Tensor:
    """Return sixteen pieces of scikit-learn's two photographs, normalized."""
    from sklearn.datasets import load_sample_images

    pieces = []
    for photo in load_sample_images().images:
        image = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255
        for i in range(8):
            part = image[:, 20 * i : 20 * i + 240, 40 * i : 40 * i + 240]
            pieces.append((part - 0.45) / 0.225)
    return nn.functional.interpolate(torch.stack(pieces), size[1:], mode="bilinear")


def deployed(
    name: str,
    model: nn.Module,
    wanted: Iterable[tuple[str, str]],
    size: tuple[int, ...],
    folder: Path,
    threads: int,
) -> dict[str, Runner | str]:
    """Return our runners of engines and precisions; a string where one cannot be had.

    Engines that lack a precision are passed over.
    """
    found: dict[str, Runner | str] = {}
    for engine, precision in wanted:
        key = f"{engine} {precision}"
        if key in found or precision not in backbones.engines.ENGINES[engine].precisions:
            continue
        try:
            found[key] = backbones.deploy(
                model,
                engine=engine,
                precision=precision,
                threads=threads,
                input_size=size,
                calibration=calibration_images(size) if precision == "int8" else None,
                agreement=0,  # of random weights no class is to be kept
                cache_dir=folder,
            )
        except BackbonesError as error:
            found[key] = str(error)
        print(f"  {name}: {key} is ready", file=sys.stderr)
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, Times]:
    """Return the times of each form of a model; what fails goes to stderr."""
    torch.manual_seed(0)  # so that a file of an earlier run is one of the same weights
    model = backbones.create_model(name).eval()
    size = (3, options.size, options.size)
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    published = timm.create_model(name).eval()  # its own where it has the model, else ours
    with tempfile.TemporaryDirectory() as folder:
        place = options.cache or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        forms = plain_forms(published, x, place / f"plain {name} {options.size}.onnx", options)
        forms = {key: form for key, form in forms.items() if key.split()[0] in options.engines}
        if options.compile:
            compiled = torch.compile(published)
            with torch.no_grad(), ops.use_reference():
                compiled(x)
            forms["compile"] = compiled
        forms = {f"plain {key}": form for key, form in forms.items()}
        engines = (*options.engines, *(["compile"] if options.compile else []))
        wanted = [(engine, p) for p in options.precisions for engine in engines]
        forms |= deployed(name, model, wanted, size, place, options.threads)
        running = {}
        for key, form in forms.items():
            if isinstance(form, str):
                print(f"  {name}: no {key}: {form}", file=sys.stderr)
            else:
                running[key] = form
        times: dict[str, list[list[float]]] = {}
        with torch.inference_mode():
            for form in running.values():
                form(x)
            first = {key: timed(form, x) for key, form in running.items()}
            slow = {key for key, ms in first.items() if ms > 4 * min(first.values())}
            for group in (running.keys() - slow, slow):
                forms = {key: form for key, form in running.items() if key in group}
                if forms:
                    times |= take_turns(forms, x, warmup_s=0.5, seconds=2 * options.seconds)
    return {key: Times(turns) for key, turns in times.items()}


def speedup(slow: Times, fast: Times) -> float:
    """Return how many times faster the second is: by turns if both took the same, else overall."""
    if len(slow.turns) != len(fast.turns):
        return slow.median / fast.median
    return float(np.median(np.divide(slow.turn_medians, fast.turn_medians)))


def best(found: dict[str, Times], start: str = "", end: str = "") -> str | None:
    """Return the fastest form whose name starts and ends so."""
    fit = {k: v for k, v in found.items() if k.startswith(start) and k.endswith(end)}
    if not start:
        fit = {k: v for k, v in fit.items() if not k.startswith("plain")}
    return min(fit, key=lambda key: fit[key].median) if fit else None


def cell(found: dict[str, Times], form: str | None, engine: bool = True) -> str:
    """Return a form's median, with the engine's name; "-" for none."""
    if form is None or form not in found:
        return "-"
    name = form.removeprefix("plain ") if form.startswith("plain ") else form.split()[0]
    return f"{found[form].median:.1f}" + (f" ({name})" if engine else "")


def ratio(found: dict[str, Times], slow: str | None, fast: str | None) -> str:
    """Return how many times faster the second form is; "-" where one is missing."""
    if slow is None or fast is None or not {slow, fast} <= found.keys():
        return "-"
    return f"{speedup(found[slow], found[fast]):.2f}x"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="default: ten models")
    parser.add_argument("--precisions", nargs="+", default=["fp32"], help="(default: fp32)")
    parser.add_argument("--size", type=int, default=224, help="height and width (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each form (%(default)s)")
    parser.add_argument(
        "--engines", nargs="+", default=ENGINES, choices=ENGINES, help="(default: all three)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile as well; slow")
    parser.add_argument("--cache", type=Path, help="folder for files (default: none are kept)")
    parser.add_argument("--all", action="store_true", help="print every form besides the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lower = [p for p in options.precisions if p != "fp32"]
    print(examine(options.threads), end="\n\n", flush=True)
    print(
        "| model | published, eager | merged, eager | best plain fp32 | deploy fp32 | against best"
        " plain | against plain ONNX Runtime |"
        + "".join(f" deploy {p} | {p} against fp32 |" for p in lower)
    )
    print("|---|---|---|---|---|---|---|" + "---|---|" * len(lower), flush=True)
    for name in options.models or MODELS:
        found = measure(name, options)
        plain, ours = best(found, "plain"), best(found, end="fp32")
        cells = [
            f"`{name}`",
            cell(found, "plain eager", engine=False),
            cell(found, "eager fp32", engine=False),
            cell(found, plain),
            cell(found, ours),
        ]
        cells += [ratio(found, form, ours) for form in (plain, "plain onnxruntime")]
        for precision in lower:
            form = best(found, end=precision)
            cells += [cell(found, form), ratio(found, ours, form)]
        print("| " + " | ".join(cells) + " |", flush=True)
        if options.all:
            for key in sorted(found, key=lambda key: found[key].median):
                print(f"    {key}: {found[key].median:.2f} ms", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
