"""``backbones bench``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backbones import bench
from backbones.cli.parsing import command, json_flag, positive
from backbones.errors import ConfigError
from backbones.files import write_json

__all__ = ["add_parser", "run"]

INTERRUPTED = 130


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command(
        commands,
        "bench",
        "measure latency on this machine",
        "backbones bench convnext_atto --engines eager,onnxruntime --precisions fp32,bf16\n"
        "         backbones bench model_best.safetensors --threads 2\n"
        "         backbones bench --front 'lsnet*' 'cpubone*' --output front\n"
        "         backbones bench --budget 10ms",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME|CHECKPOINT",
        help="names of models, or checkpoints; for a front also patterns of names",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="the same as CHECKPOINT; with a NAME, weights of that model",
    )
    parser.add_argument("--engines", metavar="A,B", help="(default: all that are installed)")
    parser.add_argument(
        "--precisions", metavar="A,B", default="fp32", help="fp32, bf16, fp16, int8 (default: fp32)"
    )
    parser.add_argument("-b", "--batch-size", type=positive, default=1, help="(default: 1)")
    parser.add_argument("--threads", type=positive, help="(default: PyTorch's)")
    parser.add_argument(
        "--img-size",
        type=positive,
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width (default: each model's)",
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="timed seconds a configuration (default: 2)"
    )
    parser.add_argument(
        "--front",
        action="store_true",
        help="compare the models' published top-1 with the latency measured here",
    )
    parser.add_argument(
        "--budget", metavar="TIME", help="name the most accurate model within 10ms, 10 or 0.01s"
    )
    parser.add_argument("--engine", help="of a front: auto, published or an engine (default: auto)")
    parser.add_argument("--calibration", metavar="DIR", help="folder of images, for int8")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for files")
    json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print what was measured; exit code 1 where nothing was, or no model keeps to the budget."""
    return _front(args) if args.front or args.budget is not None else _benchmark(args)


def _benchmark(args: argparse.Namespace) -> int:
    if args.engine is not None:
        raise ConfigError("--engine is for --front and --budget; here it is --engines A,B")
    if args.checkpoint is not None and len(args.names) > 1:
        raise ConfigError("--checkpoint holds one model; name one, or none")
    if not args.names and args.checkpoint is None:
        raise ConfigError("name a model, or a checkpoint (--checkpoint), or add --front")
    reports = []
    with _Bar() as bar:
        for name in args.names or [None]:
            report = bench.benchmark(
                name,
                checkpoint=args.checkpoint,
                engines=None if args.engines is None else _listed(args.engines),
                precisions=_listed(args.precisions),
                progress=bar.show,
                **_conditions(args),
            )
            reports.append(report)
            if not args.json:
                bar.say(f"{report}\n")
    facts = [report.as_dict() for report in reports]
    if args.json:
        print(json.dumps(facts))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        file = write_json(args.output / "bench.json", facts)
        print(f"{file} holds this for programs", file=sys.stderr)
    return 0 if all(report.best is not None for report in reports) else 1


def _front(args: argparse.Namespace) -> int:
    for option in ("checkpoint", "engines"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option} does not go with --front and --budget")
    precisions = _listed(args.precisions)
    if len(precisions) != 1:
        raise ConfigError("a front is of one precision; give --precisions one")
    budget = None if args.budget is None else bench.parse_budget(args.budget)
    with _Bar() as bar:
        front = bench.front(
            args.names or None,
            engine=args.engine or "auto",
            precision=precisions[0],
            budget_ms=budget,
            progress=bar.show,
            **_conditions(args),
        )
    choice = None if budget is None else bench.within(front.rows, budget)
    if args.json:
        print(json.dumps(bench.front_as_dict(front, choice)))
    else:
        print(front)
        if choice is not None and choice.best is not None:
            print(f"\n{choice}")
    if args.output is not None:
        files = bench.write_front(front, args.output, choice)
        print(f"{args.output} holds {', '.join(file.name for file in files)}", file=sys.stderr)
    if not front.complete:
        return INTERRUPTED
    if choice is not None and choice.best is None:
        print(f"error: {choice}", file=sys.stderr)
        return 1
    return 0 if any(row.measured for row in front.rows) else 1


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    size = args.img_size
    if size is not None and len(size) > 2:
        raise ConfigError("--img-size takes a side, or height and width")
    return {
        "batch_size": args.batch_size,
        "threads": args.threads,
        "input_size": None if size is None else (size[0], size[-1]),
        "seconds": args.seconds,
        "calibration": args.calibration,
    }


def _listed(text: str) -> list[str]:
    """Return the parts of ``a,b``."""
    return [part.strip() for part in text.split(",") if part.strip()]


class _Bar:
    """A progress bar over the whole; none without a terminal."""

    def __init__(self) -> None:
        self.bar = tqdm(
            total=100,
            leave=False,
            disable=None,
            bar_format="{percentage:3.0f}%|{bar:20}| {desc} [{elapsed}]",
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, share: float, what: str) -> None:
        """Show how far the measurement is."""
        self.bar.set_description_str(what, refresh=False)
        self.bar.n = round(100 * share)
        self.bar.refresh()

    def say(self, text: str) -> None:
        """Print above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
