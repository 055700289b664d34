"""What is asked of an engine: a checked request, and the copy of the model that it starts."""

from collections.abc import Sequence
from functools import cache
from os import PathLike
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from torch import nn

from backbones.engines.caching import content_key
from backbones.engines.exporting import AGREEMENT, export
from backbones.engines.preparation import (
    PRECISIONS,
    Images,
    input_size_of,
    load_images,
    load_labels,
    reparameterized_copy,
)
from backbones.engines.runners import Deployment, Runner
from backbones.engines.targets import available_engines, find_engine
from backbones.errors import ConfigError
from backbones.factory import label_names
from backbones.images import fit_channels
from backbones.wrappers import unwrapped

__all__ = ["add_facts", "request_of"]


def request_of(
    model: nn.Module,
    engine: str | Sequence[str],
    precision: str,
    threads: int | None,
    input_size: Sequence[int] | None,
    batch_size: int,
    calibration: Images | None,
    cache_dir: str | PathLike[str] | None,
    agreement: float = AGREEMENT,
) -> tuple[list[str], Deployment]:
    """Return the engines asked for, and what they are to start; arguments are those of `deploy`."""
    if precision not in (*PRECISIONS, "auto"):
        raise ConfigError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}, auto")
    if engine == "auto":
        names = available_engines()
    else:
        names = [engine] if isinstance(engine, str) else list(engine)
    if not names:
        raise ConfigError("name at least one engine, or 'auto'")
    for name in names:
        find_engine(name)
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ConfigError("threads and batch_size must be at least 1")
    if calibration is None and precision in ("int8", "auto"):
        raise ConfigError(
            f"precision {precision!r} needs real images; pass calibration=FOLDER or a tensor"
        )
    model = unwrapped(model)
    size = input_size_of(model, input_size)
    data_config = fit_channels({**resolve_model_data_config(model), "input_size": size}, size[0])
    images, labels = None, None
    if calibration is not None:
        images = load_images(calibration, data_config)
        labels = load_labels(calibration, label_names(model))
    folder = Path(cache_dir or Path(torch.hub.get_dir(), "backbones", "engines"))
    deployment = Deployment(
        source=cache(lambda: reparameterized_copy(model)),
        size=size,
        batch_size=batch_size,
        precision=precision,
        threads=threads or torch.get_num_threads(),
        folder=folder / content_key(model, size, images),
        export=export,
        images=images,
        labels=labels,
        agreement=agreement,
    )
    deployment.folder.mkdir(parents=True, exist_ok=True)
    return names, deployment


def add_facts(runner: Runner, model: nn.Module, size: Sequence[int]) -> None:
    """Let a runner say what its model takes and its classes, though no file of it does."""
    model = unwrapped(model)
    config = {**resolve_model_data_config(model), "input_size": tuple(size)}
    facts = {"input": fit_channels(config, size[0]), "classes": label_names(model)}
    runner.metadata = facts | {key: value for key, value in runner.metadata.items() if value}
