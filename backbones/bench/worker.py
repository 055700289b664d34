"""A child process of a benchmark: one configuration, measured in its turns.

Started as ``python -m backbones.bench.worker``; speaks `backbones.bench.protocol`. The first
request says what to do:

``{"do": "load", ...}``
    Load a model (the fields are those of `Conditions.job`), warm it up and reply with facts. Then
    ``{"do": "turn", "seconds": s, "calls": n}`` makes calls that refill the caches and then timed
    calls, at least n and for at least s seconds; the reply holds their milliseconds. Any number of
    turns may follow.
``{"do": "matmul", "threads": t, "kinds": [...]}``
    Measure matrix products (`backbones.bench.machine.matmul_peak`).
``{"do": "end"}``
    Reply with the peak memory and leave. So does a parent that is gone.
"""

import copy
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from backbones import ops
from backbones.bench.machine import matmul_peak, peak_memory_mib, usable_cpus
from backbones.bench.model_spec import ModelSpec
from backbones.bench.protocol import Channel
from backbones.engines import deploy, input_size_of, settle, timed_for
from backbones.errors import BackbonesError, UnsupportedError
from backbones.info import count_macs, count_parameters

__all__ = ["main"]

Call = Callable[[Tensor], Any]


def main() -> int:
    """Serve one parent until it ends."""
    channel = Channel()
    request = channel.receive()
    try:
        if request is None:
            return 0
        torch.set_num_threads(request["threads"])
        if request["do"] == "matmul":
            channel.send(matmul_peak(request["kinds"]))
            channel.receive()
        else:
            _serve(channel, request)
        channel.send({"peak_mib": peak_memory_mib()})
    except Exception as error:  # whatever a model or an engine may raise is the parent's to report
        traceback.print_exc()
        kind = type(error).__name__
        message = str(error) if isinstance(error, BackbonesError) else f"{kind}: {error}"
        channel.send({"error": message, "kind": kind})
        return 1
    return 0


def _serve(channel: Channel, job: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"base_mib": peak_memory_mib()}
    start = time.perf_counter()
    call, context = _load(job, facts)
    facts["load_s"] = time.perf_counter() - start
    images = torch.randn(
        job["batch_size"], *facts["input_size"], generator=torch.Generator().manual_seed(0)
    )
    with context, torch.inference_mode():
        call(images)
        facts["warmup_ms"] = min(timed_for(call, images, job["warmup_s"], 2))
        facts["threads"] = torch.get_num_threads()
        facts["cpus"] = usable_cpus()
        channel.send(facts)
        idle = (time.perf_counter(), time.process_time())
        while (request := channel.receive()) and request["do"] == "turn":
            waited = (time.perf_counter() - idle[0], time.process_time() - idle[1])
            turn = _turn(call, images, request["seconds"], request["calls"])
            channel.send({**turn, "idle_s": waited[0], "idle_cpu_s": waited[1]})
            idle = (time.perf_counter(), time.process_time())


def _load(job: dict[str, Any], facts: dict[str, Any]) -> tuple[Call, AbstractContextManager[Any]]:
    """Return what to call and in which context; note what is known of it."""
    published = job["form"] == "published"
    torch.manual_seed(0)
    spec = ModelSpec(**job["model"])
    model = spec.build()
    if published and getattr(model, "deployed", False):
        raise UnsupportedError(
            "the checkpoint is re-parameterized; the form its authors wrote cannot be had from it"
        )
    size = input_size_of(model, job["input_size"])
    facts |= {"input_size": size, "params": count_parameters(model), "macs": _macs(model, size)}
    if published:
        facts |= {"engine": "eager", "layout": "nchw"}
        return model, ops.use_reference()
    runner = deploy(
        model,
        engine=job["engine"],
        precision=job["precision"],
        threads=job["threads"],
        input_size=size,
        batch_size=job["batch_size"],
        calibration=job["calibration"],
        agreement=spec.agreement,
        cache_dir=job["cache_dir"],
        time_limit=job["auto_start_s"],
    )
    facts |= {"engine": runner.engine, "layout": runner.layout, "engine_threads": runner.threads}
    return runner, nullcontext()


def _macs(model: nn.Module, size: tuple[int, ...]) -> int | None:
    """Count multiply-adds on a twin without values; None for models that need theirs."""
    tensors = [*model.parameters(), *model.buffers()]
    # The copy finds its tensors made already, so that the peak memory is that of one model.
    made: dict[int, Any] = {id(t): t.detach().to("meta") for t in tensors}
    for tensor in model.parameters():
        made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
    twin = copy.deepcopy(model, made)
    try:
        return count_macs(twin, size)
    except (NotImplementedError, RuntimeError):
        traceback.print_exc()
        return None


def _turn(call: Call, images: Tensor, seconds: float, calls: int) -> dict[str, Any]:
    settle(call, images)
    start, busy = time.perf_counter(), time.process_time()
    times = timed_for(call, images, seconds, calls)
    wall, cpu = time.perf_counter() - start, time.process_time() - busy
    return {"ms": times, "wall_s": wall, "cpu_s": cpu}


if __name__ == "__main__":
    sys.exit(main())
