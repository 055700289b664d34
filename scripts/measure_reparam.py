"""Measure the latency of models before and after re-parameterization.

    python scripts/measure_reparam.py                     # the smallest member of every family
    python scripts/measure_reparam.py lsnet_t cpubone_b0  # these
    python scripts/measure_reparam.py --threads 1 --channels-last

Eager PyTorch in float32, one image of 224x224. The two forms are called in turn, so that both see
the same load: the ratio says more than the times. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse

import torch

import backbones
from backbones.bench import compare_latency
from backbones.reparameterization import reparameterize_with_report


def smallest_of_each_family() -> list[str]:
    def size(name: str) -> int:
        return backbones.model_info(name).params

    return [
        min(backbones.list_models(family=family), key=size) for family in backbones.list_families()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="default: the smallest of every family")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--seconds", type=float, default=6.0, help="measurement of each form")
    parser.add_argument("--channels-last", action="store_true", help="memory layout of the input")
    options = parser.parse_args()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    x = torch.randn(1, 3, 224, 224).to(memory_format=layout)
    print(f"torch {torch.__version__}, {options.threads} threads, float32, batch 1, 224x224\n")
    print("| model | before (ms) | after (ms) | faster | operators | largest difference |")
    print("|---|---|---|---|---|---|")
    for name in options.models or smallest_of_each_family():
        model = backbones.create_model(name).eval().to(memory_format=layout)
        merged, report = reparameterize_with_report(model)
        times = compare_latency(
            {"before": model, "after": merged},
            x,
            threads=options.threads,
            seconds=options.seconds,
        )
        before, after = times["before"].median_ms, times["after"].median_ms
        operators = " to ".join(map(str, report.operations or ()))
        print(
            f"| `{name}` | {before:.1f} | {after:.1f} | {before / after:.2f}x | {operators} |"
            f" {report.largest_difference:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
