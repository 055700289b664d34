"""Which memory layout of images and weights a model trains faster in, by measurement."""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from backbones.train.config import TrainConfig
from backbones.train.convolutions import cpu_convolutions
from backbones.train.distributed import ProcessGroup
from backbones.train.setup.freezing import freeze_backbone

__all__ = ["with_memory_layout"]

LAYOUTS = (torch.contiguous_format, torch.channels_last)
IMAGES = 8  # of a measured step on a CPU; more change the ratio little, and take longer
ROUNDS, MOST_ROUNDS, SECONDS = 3, 10, 2.0  # of one step in each layout
GAIN = 1.03  # below which the usual layout stays


def with_memory_layout(
    config: TrainConfig, group: ProcessGroup, model: nn.Module, say: Callable[[str], None]
) -> TrainConfig:
    """Return the options with ``channels_last`` decided, where it is ``auto``.

    A copy of the model takes a few steps on random images in either layout, by turns. All processes
    come to the same decision. The model and the random numbers to come stay as they are.
    """
    if config.channels_last != "auto":
        return config
    if config.torchcompile:  # which chooses layouts by itself
        return dataclasses.replace(config, channels_last=False)
    gain = group.mean(_gain(config, group.device, model))
    chosen = gain >= GAIN
    say(
        f"memory layout: {'channels last' if chosen else 'contiguous'}; a step in channels last is"
        f" {gain:.2f} times as fast"
    )
    return dataclasses.replace(config, channels_last=chosen)


def _gain(config: TrainConfig, device: torch.device, model: nn.Module) -> float:
    """Return how many times as fast a step is in channels last, as the median over rounds."""
    twin = copy.deepcopy(model).to(device).train()
    if config.grad_checkpointing:
        twin.set_grad_checkpointing(True)  # type: ignore[operator]
    if config.freeze_backbone:
        for part in freeze_backbone(twin):
            part.eval()
    size = resolve_model_data_config(model)["input_size"]
    count = config.batch_size if device.type == "cuda" else min(config.batch_size, IMAGES)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        images = torch.randn(count, *size, device=device)
        for layout in LAYOUTS:  # which are slow at first, and show how long a round takes
            slowest = _step(config, twin, images, layout)
        rounds = max(1 if slowest > SECONDS else ROUNDS, min(MOST_ROUNDS, int(SECONDS / slowest)))
        times = [[_step(config, twin, images, layout) for layout in LAYOUTS] for _ in range(rounds)]
    return statistics.median(usual / last for usual, last in times)


def _step(config: TrainConfig, model: nn.Module, images: Tensor, layout: Any) -> float:
    """Return the seconds of a step, forward and backward; moving the data there is not counted."""
    model.to(memory_format=layout)  # type: ignore[call-overload]
    images, device = images.contiguous(memory_format=layout), images.device.type
    dtype = getattr(torch, config.amp_dtype)
    start = _now(device)
    precision = torch.autocast(device, dtype) if config.amp else nullcontext()
    with cpu_convolutions(model), precision:
        output = model(images)
    outputs = output if isinstance(output, list | tuple) else [output]
    loss = torch.stack([one.float().square().mean() for one in outputs]).sum()
    loss.backward()
    seconds = _now(device) - start
    model.zero_grad()
    return seconds


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
