"""The model that runs: by name, from a checkpoint or an exported file, a module or a runner."""

import copy
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Union

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from backbones.engines import (
    Runner,
    Setting,
    content_key,
    deploy_for_throughput,
    file_suffixes,
    open_exported,
    torch_threads,
)
from backbones.errors import ConfigError, UnsupportedError
from backbones.factory import create_model, is_checkpoint, label_names, load_model
from backbones.images import fit_channels
from backbones.inference.options import Options
from backbones.wrappers import unwrapped

__all__ = ["ModelLike", "OpenModel", "class_names", "open_inference_model"]

ModelLike = Union[str, "PathLike[str]", nn.Module, Runner]
_BATCH = 8  # where none is measured
_MANY = 2000  # images from which on it pays to convert a model and to measure


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to run.

    `call` takes images (B, C, H, W), or uint8 (1, H, W, C) if `raw`, and returns logits or
    embeddings; up to ``setting.streams`` calls at once. `classes` are the names of its classes,
    None if they are not known. `key` gives a digest of all that the outputs depend on.
    """

    call: Callable[[Tensor], Tensor]
    setting: Setting
    data_config: Mapping[str, Any]
    classes: Sequence[str] | None
    key: Callable[[], str]
    raw: bool = False
    num_classes: int | None = None


def open_inference_model(
    model: ModelLike, options: Options, count: int | None, setting: Setting | None
) -> OpenModel:
    """Open a model to run over `count` images (None: many), by a `setting` where one is told.

    Raises:
        ConfigError: an option that the model does not have, or an exported file that does not say
            how images are prepared for it.
        UnsupportedError: embeddings of a model that no longer has them.
        BackbonesError: the model cannot be had, or does not run in the engine.
    """
    engine, precision, batch_size = options.engine, options.precision, options.batch_size
    if isinstance(model, str | PathLike) and Path(model).suffix in file_suffixes():
        model = open_exported(model, threads=options.threads)
    if isinstance(model, Runner):
        if options.features:
            raise UnsupportedError(
                f"{model.what} gives logits, not embeddings; name the model or a checkpoint"
            )
        if engine != "auto" or precision != "fp32" or options.input_size is not None:
            raise ConfigError(
                f"{model.what} has its engine, precision and input size; leave these options out"
            )
        return _of_runner(model, batch_size, count)
    if isinstance(model, str | PathLike):
        if is_checkpoint(str(model)):
            module = load_model(model)  # type: ignore[arg-type]
        else:
            module = create_model(str(model), pretrained=True).eval()
    else:
        module = unwrapped(model)
    known = resolve_model_data_config(module)
    channels = getattr(module, "in_chans", None) or known["input_size"][0]
    height, width = (options.input_size or known["input_size"])[-2:]
    data_config = fit_channels({**known, "input_size": (channels, height, width)}, channels)
    classes, num_classes = class_names(module), getattr(module, "num_classes", None)
    if options.features:
        module = _without_classifier(module)
    if setting is None and count is not None and count < _MANY:
        size, cores = min(batch_size or _BATCH, count), options.threads or torch.get_num_threads()
        if engine != "auto":
            setting = Setting(engine, precision, size, 1, cores)
        elif precision == "fp32":
            setting = Setting(_PLAIN, precision, size, 1, cores)
    call: Callable[[Tensor], Tensor]
    if setting is not None and setting.engine == _PLAIN:
        call, key = _as_it_is(module, setting, data_config["input_size"])
    else:
        found = deploy_for_throughput(
            module,
            engine=engine,
            precision=precision,
            threads=options.threads,
            batch_size=batch_size,
            setting=setting,
            input_size=data_config["input_size"],
            calibration=options.calibration,
            cache_dir=options.cache_dir,
            progress=options.progress,
        )
        call, setting, key = found.runner, found.setting, lambda: found.key
    return OpenModel(call, setting, data_config, classes, key, num_classes=num_classes)


_PLAIN = "pytorch"  # the model as it is: nothing is converted or merged


def _as_it_is(
    module: nn.Module, setting: Setting, size: Sequence[int]
) -> tuple[Callable[[Tensor], Tensor], Callable[[], str]]:
    """Return a module without preparation, which is soonest for a few images, and its key."""
    if module.training:
        module = copy.deepcopy(module).eval()
    first = next(module.parameters(), torch.empty(0))
    turn = threading.Lock()

    def call(images: Tensor) -> Tensor:
        # Taking turns, as the number of threads is the process's.
        with torch.inference_mode(), turn, torch_threads(setting.threads):
            return module(images.to(first.device, first.dtype)).float().cpu()

    return call, lambda: content_key(module, size)


def _of_runner(runner: Runner, batch_size: int | None, count: int | None) -> OpenModel:
    config = runner.metadata.get("input")
    if not config:
        raise ConfigError(
            f"{runner.what} does not say how images are prepared for it; give the model itself, or"
            " a file that export wrote"
        )
    fixed = runner.shape[0] if isinstance(runner.shape[0], int) else None
    if fixed and batch_size not in (None, fixed):
        raise ConfigError(f"{runner.what} takes batches of {fixed}, not of {batch_size}")
    size = 1 if runner.raw else fixed or batch_size or min(_BATCH, count or _BATCH)
    setting = Setting(runner.engine, runner.precision, size, 1, runner.threads)
    path = Path(str(runner.what))

    def key() -> str:
        content = path.read_bytes() if path.is_file() else str(runner.what).encode()
        return hashlib.sha256(content).hexdigest()[:32]

    classes = runner.metadata.get("classes")
    return OpenModel(runner, setting, dict(config), classes, key, runner.raw)


def _without_classifier(module: nn.Module) -> nn.Module:
    """Return a copy that gives what goes into the classifier, (B, C)."""
    if getattr(module, "deployed", False):
        raise UnsupportedError(
            "the re-parameterized form has no embeddings, since its last norm is a part of the"
            " classifier; use the checkpoint that it was made from"
        )
    if not hasattr(module, "reset_classifier"):
        raise UnsupportedError(f"{type(module).__name__} has no classifier to leave out")
    module = copy.deepcopy(module)
    module.reset_classifier(0)  # type: ignore[operator]
    return module


def class_names(module: nn.Module) -> list[str] | None:
    """Return the names of a model's classes, where they are known."""
    if names := label_names(module):
        return names
    subset = infer_imagenet_subset(module)
    return ImageNetInfo(subset).label_descriptions() if subset else None
