"""What an int8 model computes in outside its int8 layers: float32, or bf16 where that pays."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from backbones.engines.caching import read_choice, write_choice
from backbones.engines.quantization import agreement_of, tells_classes
from backbones.engines.runners import Deployment, Runner
from backbones.engines.timing import take_turns
from backbones.engines.verification import run_model

__all__ = ["rest_for"]


def rest_for(deployment: Deployment, open: Callable[[str], Runner]) -> str:
    """Return the precision for what int8 leaves out: ``bf16`` if it is faster here and holds.

    It holds if the images keep their class in float32 for the share asked for, by the measure of
    `to_target`, or as often as with the rest in fp32. What is found is remembered.

    Args:
        deployment: what is started, in int8.
        open: starts it with the rest in a precision.
    """
    request = {
        "rest of": deployment.precision,
        "batch_size": deployment.batch_size,
        "threads": deployment.threads,
        "streams": deployment.streams,
        "agreement": deployment.agreement,
    }
    earlier = read_choice(deployment.folder, request)
    if earlier is None:
        earlier = {"rest": _measured(deployment, {rest: open(rest) for rest in ("fp32", "bf16")})}
        write_choice(deployment.folder, request, earlier)
    return cast("str", earlier["rest"])


def _measured(deployment: Deployment, runners: dict[str, Runner]) -> str:
    times = take_turns(runners, deployment.example, warmup_s=0.1, seconds=0.5)
    slow, fast = ([np.median(turn) for turn in times[rest]] for rest in ("fp32", "bf16"))
    if np.median(np.divide(fast, slow)) >= 1:
        return "fp32"
    images = deployment.images
    if images is None or not deployment.agreement:
        return "bf16"
    expected = run_model(deployment.model, images)
    if not tells_classes(expected):
        return "bf16"
    same = {
        rest: agreement_of(expected, torch.cat([runner(part) for part in images.split(8)]))
        for rest, runner in runners.items()
    }
    return "bf16" if same["bf16"] >= min(deployment.agreement, same["fp32"]) else "fp32"
