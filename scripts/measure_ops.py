"""Measure the operators of ``backbones.ops`` against their straightforward forms.

    python scripts/measure_ops.py                # a table
    python scripts/measure_ops.py --json         # the same for programs
    python scripts/measure_ops.py --threads 1 --seconds 3

Times are wall times of float32 calls on the CPU at batch 1. The two forms of a line take turns of
a tenth of a second, so that both see the same load; a turn begins with calls that are not counted,
because the form before it has emptied the caches and given its buffers back. The ratio is taken
between medians (and between minima, which a busy machine disturbs least). A large buffer costs more
in a process that has not used as much before, so ratios differ between a fresh process and one that
has run a while. Memory is the peak of the process beyond arguments and result; it needs Linux.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import ops
from backbones.bench import Times
from backbones.engines import take_turns

Operator = Callable[..., Tensor]


def unfold_by_image(x: Tensor, kernels: Tensor) -> Tensor:
    patches = F.unfold(x, kernels.shape[2], padding=kernels.shape[2] // 2)
    patches = patches.unflatten(1, (x.shape[1], -1))
    return (patches * kernels.flatten(2).unsqueeze(3)).sum(2).view_as(x)


def unfold_multiply_sum(x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    groups, taps = weight.shape[1:3]
    k = round(taps**0.5)
    patches = F.unfold(x, k, padding=k // 2)
    patches = patches.view(batch, channels // groups, groups, taps, height, width)
    return (patches * weight.unsqueeze(1)).sum(3).view_as(x)


def unfold_by_neighbors(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    groups, taps = weight.shape[1:3]
    k = round(taps**0.5)
    patches = F.unfold(x, k, padding=k // 2, stride=stride)
    patches = patches.view(x.shape[0], groups, -1, taps, *weight.shape[3:])
    return (patches * weight.unsqueeze(2)).sum(3).flatten(1, 2)


def shifted_sum(value: Tensor, attention: Tensor, k: int) -> Tensor:
    """One shifted map per tap; rows are shifted once for the k taps they share."""
    rows, cols = (
        (torch.arange(n) - k // 2).clamp(0, n - k) for n in (value.shape[-2], value.shape[-1])
    )
    out = torch.zeros_like(value)
    for a in range(k):
        lines = value.index_select(-2, rows + a)
        for b in range(k):
            shifted = lines.index_select(-1, cols + b)
            out = torch.addcmul(out, shifted, attention[..., k * a + b].unsqueeze(2))
    return out


def fast_fourier(x: Tensor, weight: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(weight)
    return torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")


def attentive_case(channels: int, side: int) -> tuple[Operator, Operator, list[Tensor]]:
    arguments = [torch.randn(1, channels, side, side), torch.randn(1, channels, 3, 3)]
    return unfold_by_image, ops.attentive_convolution, arguments


def small_kernel_case(channels: int, side: int) -> tuple[Operator, Operator, list[Tensor]]:
    x = torch.randn(1, channels, side, side)
    weight = torch.randn(1, channels // 8, 9, side, side)
    return unfold_multiply_sum, ops.small_kernel_aggregation, [x, weight]


def involution_case(
    channels: int, side: int, k: int, stride: int
) -> tuple[Operator, Operator, list[Tensor]]:
    x = torch.randn(1, channels, side, side)
    weight = torch.randn(1, channels // 16, k * k, side // stride, side // stride)
    return (
        lambda x, w: unfold_by_neighbors(x, w, stride),
        lambda x, w: ops.involution(x, w, stride),
        [x, weight],
    )


def unfold_compare_sum(query: Tensor, key: Tensor) -> Tensor:
    patches = F.unfold(key, 3, padding=1).unflatten(1, (-1, 9)).unflatten(3, key.shape[2:])
    return (patches * query.unsqueeze(2)).sum(1)


def correlation_case(heads: int, side: int) -> tuple[Operator, Operator, list[Tensor]]:
    def ours(query: Tensor, key: Tensor) -> Tensor:
        return ops.small_kernel_correlation(query, key, 3)

    return unfold_compare_sum, ours, list(torch.randn(2, heads, 24, side, side))


def neighborhood_case(
    groups: int, channels: int, side: int, k: int
) -> tuple[Operator, Operator, list[Tensor]]:
    value = torch.randn(1, groups, channels, side, side)
    attention = torch.randn(1, groups, side, side, k * k).softmax(-1)
    return (
        lambda v, a: shifted_sum(v, a, k),
        lambda v, a: ops.neighborhood_aggregation(v, a, k),
        [value, attention],
    )


def spectral_case(channels: int, side: int) -> tuple[Operator, Operator, list[Tensor]]:
    x = torch.randn(1, channels, side, side)
    weight = torch.randn(channels, side, side // 2 + 1, 2)
    return fast_fourier, ops.spectral_filter, [x, weight]


# The first line of each operator is the one with a target; the others are the shapes of models.
SPEED: dict[str, tuple[float, Callable[[], tuple[Operator, Operator, list[Tensor]]]]] = {
    "attentive 32x56x56 k=3 / unfold": (1.0, lambda: attentive_case(32, 56)),
    "attentive 64x28x28 k=3 / unfold": (1.0, lambda: attentive_case(64, 28)),
    "attentive 128x14x14 k=3 / unfold": (1.0, lambda: attentive_case(128, 14)),
    "attentive 240x7x7 k=3 / unfold": (1.0, lambda: attentive_case(240, 7)),
    "small_kernel 64x28x28 wc=8 k=3 / unfold": (3.0, lambda: small_kernel_case(64, 28)),
    "small_kernel 128x28x28 wc=16 k=3 / unfold": (1.0, lambda: small_kernel_case(128, 28)),
    "small_kernel 192x14x14 wc=24 k=3 / unfold": (1.0, lambda: small_kernel_case(192, 14)),
    "small_kernel 256x7x7 wc=32 k=3 / unfold": (1.0, lambda: small_kernel_case(256, 7)),
    "involution 64x56x56 k=7 / unfold": (1.0, lambda: involution_case(64, 56, 7, 1)),
    "involution 128x28x28 k=7 / unfold": (1.0, lambda: involution_case(128, 28, 7, 1)),
    "involution 128x56x56 k=7 s=2 / unfold": (1.0, lambda: involution_case(128, 56, 7, 2)),
    "involution 512x14x14 k=7 s=2 / unfold": (1.0, lambda: involution_case(512, 14, 7, 2)),
    "correlation 2x24x56x56 k=3 / unfold": (1.0, lambda: correlation_case(2, 56)),
    "correlation 4x24x28x28 k=3 / unfold": (1.0, lambda: correlation_case(4, 28)),
    "correlation 8x24x14x14 k=3 / unfold": (1.0, lambda: correlation_case(8, 14)),
    "neighborhood 8x16x14x14 k=13 / shifted sum": (10.0, lambda: neighborhood_case(8, 16, 14, 13)),
    "neighborhood 8x16x14x14 k=5 / shifted sum": (1.0, lambda: neighborhood_case(8, 16, 14, 5)),
    "neighborhood 12x14x7x7 k=7 / shifted sum": (1.0, lambda: neighborhood_case(12, 14, 7, 7)),
    "neighborhood 12x14x7x7 k=5 / shifted sum": (1.0, lambda: neighborhood_case(12, 14, 7, 5)),
    "neighborhood 8x16x32x32 k=13 / shifted sum": (1.0, lambda: neighborhood_case(8, 16, 32, 13)),
    "neighborhood 8x16x64x64 k=13 / shifted sum": (1.0, lambda: neighborhood_case(8, 16, 64, 13)),
    "spectral 496x7x7 / rfft2": (1.0, lambda: spectral_case(496, 7)),
    "spectral 240x14x14 / rfft2": (1.0, lambda: spectral_case(240, 14)),
    "spectral 480x12x12 / rfft2": (1.0, lambda: spectral_case(480, 12)),
    "spectral 240x16x16 / rfft2": (1.0, lambda: spectral_case(240, 16)),
    "spectral 240x20x20 / rfft2": (1.0, lambda: spectral_case(240, 20)),
    "spectral 480x24x24 / rfft2": (1.0, lambda: spectral_case(480, 24)),
    "spectral 240x32x32 / rfft2": (1.0, lambda: spectral_case(240, 32)),
}


def forward(function: Operator, arguments: list[Tensor]) -> None:
    with torch.no_grad():
        function(*arguments)


def forward_backward(function: Operator, arguments: list[Tensor]) -> None:
    leaves = [argument.requires_grad_() for argument in arguments]
    out = function(*leaves)
    torch.autograd.grad(out, leaves, out.detach())


def measure_speed(seconds: float, only: str) -> list[dict[str, Any]]:
    lines = []
    for name, (target, make) in SPEED.items():
        if only not in name:
            continue
        plain, ours, arguments = make()
        for mode, run in (("forward", forward), ("training", forward_backward)):
            forms = {"plain": partial(run, plain), "ours": partial(run, ours)}
            turns = take_turns(forms, arguments, warmup_s=0.0, seconds=seconds)
            plain_ms, our_ms = (Times(turns[form]) for form in forms)
            lines.append(
                {
                    "case": name,
                    "mode": mode,
                    "plain_ms": plain_ms.median,
                    "ours_ms": our_ms.median,
                    "ratio": plain_ms.median / our_ms.median,
                    "ratio_of_minima": min(plain_ms.calls) / min(our_ms.calls),
                    "target": target if mode == "forward" else None,
                }
            )
    return lines


def status_mib(key: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def measure_memory() -> list[dict[str, Any]]:
    """MiB beyond arguments and result of a forward pass on a 64 x 64 map, by kernel size."""
    if sys.platform != "linux":
        return []
    lines = []
    for k in (3, 5, 7, 9, 11, 13):
        _, ours, arguments = neighborhood_case(8, 16, 64, k)
        with torch.no_grad():
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before = status_mib("VmRSS")
            result = ours(*arguments)
            extra = status_mib("VmHWM") - before - result.nbytes / 2**20
        lines.append(
            {
                "kernel_size": k,
                "extra_mib": extra,
                "windows_mib": result.nbytes * k * k / 2**20,
                "attention_mib": arguments[1].nbytes / 2**20,
            }
        )
    return lines


def spectral_error() -> float:
    """Largest relative difference from the fast Fourier transform in float64, up to 32 x 32."""
    worst = 0.0
    for height in range(1, 33):
        for width in (height, 33 - height, 14):
            x = torch.randn(1, 4, height, width, dtype=torch.float64)
            weight = torch.randn(4, height, width // 2 + 1, 2, dtype=torch.float64)
            expected = fast_fourier(x, weight)
            error = (ops.spectral_filter(x, weight) - expected).abs().max() / expected.abs().max()
            worst = max(worst, error.item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each form (%(default)s)")
    parser.add_argument("--only", default="", help="only the lines with this in their name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    memory = measure_memory()  # first, while the process has no freed memory to reuse
    error = spectral_error()
    speed = measure_speed(options.seconds, options.only)
    if options.json:
        machine = {"processor": platform.machine(), "torch": torch.__version__}
        machine["threads"] = options.threads
        answer = {"machine": machine, "speed": speed, "memory": memory, "spectral_error": error}
        print(json.dumps(answer, indent=2))
        return
    print(f"torch {torch.__version__}, {options.threads} threads, float32, batch 1")
    print(
        f"{'case':44} {'mode':9} {'plain ms':>9} {'ours ms':>8} {'ratio':>6} {'minima':>6} target"
    )
    for x in speed:
        target = f"{x['target']:.0f}" if x["target"] else ""
        print(
            f"{x['case']:44} {x['mode']:9} {x['plain_ms']:9.3f} {x['ours_ms']:8.3f} "
            f"{x['ratio']:6.1f} {x['ratio_of_minima']:6.1f} {target:>6}"
        )
    print("\nneighborhood 8x16x64x64, forward: peak memory beyond arguments and result")
    for x in memory:
        print(
            f"k={x['kernel_size']:<3} {x['extra_mib']:6.1f} MiB   (attention itself "
            f"{x['attention_mib']:6.1f}, all windows {x['windows_mib']:6.1f})"
        )
    print(f"\nspectral, float64, up to 32 x 32: largest relative difference {error:.1e}")


if __name__ == "__main__":
    main()
