"""The main job in one call: images in, a trained, checked and exported model out."""

import dataclasses
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from backbones.bench import Latency, compare_latency
from backbones.engines import (
    OnnxRuntimeRunner,
    available_engines,
    compare,
    deploy,
    export,
    versions,
)
from backbones.errors import ConfigError, ExportError
from backbones.factory import create_model
from backbones.files import write_json
from backbones.info import model_info
from backbones.optional import optional_import
from backbones.train import (
    Evaluation,
    ImageFolder,
    TrainConfig,
    Update,
    draw_predictions,
    eval_loader,
    evaluate,
    image_folder,
    write_digits,
)
from backbones.train import run as train
from backbones.weights import save_checkpoint

__all__ = ["RESULTS", "QuickstartConfig", "run"]

TRAINING = "training"  # the folder of the run's checkpoints
RESULTS = ("model.safetensors", "model.onnx", "report.json", "predictions.png")
LIBRARIES = ("torch", "timm", "onnx", "onnxruntime", "onnxscript")
NEEDS = ("onnx", "onnxscript", "onnxruntime", "sklearn", "matplotlib")


@dataclass(frozen=True)
class QuickstartConfig:
    """What to train, how long and where the results go.

    `limit` takes only so many of the images, `min_top1` (percent) is what validation must reach,
    `threads` None means PyTorch's default.
    """

    model: str = "cpubone_nano"
    output: Path = Path("quickstart-output")
    epochs: int = 12
    size: int = 64
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0
    limit: int | None = None
    min_top1: float = 98.5
    threads: int | None = None


def run(
    config: QuickstartConfig,
    say: Callable[[str], None],
    progress: Callable[[Update], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune a small model on handwritten digits, validate, save, export and compare it.

    The output folder then holds ``digits/`` (the image folder) and the files of `RESULTS`.

    Args:
        config: what to do.
        say: takes lines for people, one a step.
        progress: called after every optimizer step.

    Returns:
        What ``report.json`` holds; ``passed`` is whether validation reached `min_top1`.

    Raises:
        BackbonesError: a step failed; files of finished steps are in the output folder.
    """
    started, output = time.perf_counter(), config.output
    _check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    output.mkdir(parents=True, exist_ok=True)
    n_train, n_val = write_digits(output / "digits", limit=config.limit)
    for name in RESULTS:  # an earlier run's results must not pass for this one's
        (output / name).unlink(missing_ok=True)
    say(f"[1/6] {n_train} + {n_val} handwritten digits are in {output / 'digits'}")

    say(f"[2/6] training {config.model}, {config.epochs} epochs at {config.size}x{config.size};")
    shutil.rmtree(output / TRAINING, ignore_errors=True)
    options = _training_options(config)
    trained = train(**options, say=lambda line: say(f"      {line}"), progress=progress)
    model, classes = trained.model, trained.classes or []

    val_set = image_folder(output / "digits", "val", classes=classes)
    val_batches = eval_loader(val_set, resolve_model_data_config(model))
    result = evaluate(model, val_batches)
    right = f"{result.correct} of {result.count} right"
    say(
        f"[3/6] validation: {right}, {result.top1:.2f} % top-1,"
        f" after {trained.seconds:.0f} s of training"
    )

    facts = {"trained_on": "scikit-learn digits", "start": str(trained.initial_weights)}
    checkpoint = output / "model.safetensors"
    save_checkpoint(model, checkpoint, classes=classes, provenance=facts)
    exported = export(model, output / "model.onnx", classes=classes)
    say(f"[4/6] saved {checkpoint} and {exported.path} ({exported.bytes / 1e6:.1f} MB)")

    by_file = evaluate(OnnxRuntimeRunner(exported.path), val_batches)
    agreement = compare(result.logits, by_file.logits)
    if agreement.top1_agreement < 1:
        raise ExportError(
            f"{exported.path}: ONNX Runtime and the model name the same class for only"
            f" {agreement.top1_agreement:.2%} of the held-out images"
        )
    say(
        f"[5/6] ONNX Runtime on the held-out images: {by_file.top1:.2f} % top-1, the same class"
        f" for all {agreement.count}, largest difference of a logit {agreement.max_error:.1e}"
    )

    latencies, best_engine = _measure(model, config.threads, say)
    draw_predictions(
        output / "predictions.png",
        val_set,
        result.predictions,
        result.targets,
        classes=classes,
        title=f"{config.model}: {right}; mistakes first, in red",
    )
    report = {
        "passed": result.top1 >= config.min_top1,
        "model": config.model,
        "start": str(trained.initial_weights),
        "top1": result.top1,
        "min_top1": config.min_top1,
        "onnx_top1": by_file.top1,
        "agreement": dataclasses.asdict(agreement),
        "best_engine": best_engine,
        "latency": {name: dataclasses.asdict(value) for name, value in latencies.items()},
        "mistakes": _mistakes(val_set, result),
        "images": {"train": n_train, "val": n_val},
        "training": options,
        "history": [dataclasses.asdict(epoch) for epoch in trained.epochs],
        "export": exported.as_dict(),
        "versions": {
            **versions(LIBRARIES),
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "training_seconds": trained.seconds,
        "seconds": time.perf_counter() - started,
    }
    write_json(output / "report.json", report)
    return report


def _measure(
    model: nn.Module, threads: int | None, say: Callable[[str], None]
) -> tuple[dict[str, Latency], str]:
    """Measure the model as it is, re-parameterized, and in the fastest engine that starts soon;
    return the latencies and that engine's name."""
    image = torch.randn(1, *resolve_model_data_config(model)["input_size"])
    engines = [name for name in ("onnxruntime", "openvino") if name in available_engines()]
    # The engines' files are for this once and are not to stay.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        plain = deploy(model, engine="eager", threads=threads, cache_dir=folder)
        best = deploy(model, engine=engines, threads=threads, cache_dir=folder)
    latencies = compare_latency({"pytorch": model, "reparameterized": plain, "best": best}, image)
    before, middle, after = latencies.values()
    say(f"[6/6] latency of one image before, eager PyTorch: {before}")
    for what, now in (
        ("re-parameterized, still eager", middle),
        (f"the best engine, {best.engine}", after),
    ):
        say(f"      {what}: {now}, {before.median_ms / now.median_ms:.1f}x as fast")
    return latencies, best.engine


def _check(config: QuickstartConfig) -> None:
    """Refuse what cannot work before anything is written."""
    for package in NEEDS:
        optional_import(package, "quickstart")
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"{config.output} is a file; give a folder as output")
    model_info(config.model)
    TrainConfig(**_training_options(config))
    model = create_model(config.model, num_classes=10, device="meta")
    model(torch.empty(2, 3, config.size, config.size, device="meta"))


def _training_options(config: QuickstartConfig) -> dict[str, Any]:
    """Return the options of training: digits are not mirrored, and cropped with care; those held
    out are for the end alone, so that no epoch is chosen by them."""
    return {
        "model": config.model,
        "data_dir": str(config.output / "digits"),
        "val_split": "",
        "recipe": "none",
        "img_size": config.size,
        "crop_pct": 1.0,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "warmup_epochs": min(1.0, config.epochs / 4),
        "scale": (0.8, 1.0),
        "ratio": (0.9, 1.1),
        "hflip": 0.0,
        "color_jitter": 0.0,
        "train_interpolation": "bicubic",
        "seed": config.seed,
        "output": str(config.output),
        "experiment": TRAINING,
    }


def _mistakes(dataset: ImageFolder, result: Evaluation) -> list[dict[str, str]]:
    """Return file, true and predicted class of every mistake."""
    wrong = (result.predictions != result.targets).nonzero().flatten().tolist()
    names, true, predicted = dataset.classes, result.targets, result.predictions
    return [
        {"file": str(dataset.path(i)), "true": names[true[i]], "predicted": names[predicted[i]]}
        for i in wrong
    ]
