"""``backbones bench``."""

import argparse
import sys
from typing import Any

from backbones import bench
from backbones.cli.opening import add_model, add_size, asked_size, open_model
from backbones.cli.parsing import command, folder, positive, tell
from backbones.cli.progress import Bar
from backbones.engines import ENGINES, PRECISIONS
from backbones.errors import ConfigError
from backbones.factory import is_checkpoint
from backbones.files import write_json

__all__ = ["add_parser"]

INTERRUPTED = 130


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "bench",
        _run,
        "measure latency or throughput on this machine",
        "backbones bench convnext_atto --engines eager,onnxruntime --precisions fp32,bf16",
        "backbones bench model_best.safetensors --threads 2",
        "backbones bench --front 'lsnet*' 'cpubone*' --output front",
        "backbones bench --budget 10ms",
        "backbones bench lsnet_t --throughput",
    )
    add_model(parser, also="; for a front also a pattern of names", names=False, nargs="*")
    parser.add_argument(
        "--engines",
        nargs="+",
        metavar="A,B",
        accepts=lambda word: {*_listed([word])} <= {"published", *ENGINES},
        help="(default: all that are installed)",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        metavar="A,B",
        default=["fp32"],
        accepts=lambda word: {*_listed([word])} <= {*PRECISIONS},
        help=f"{', '.join(PRECISIONS)} (default: fp32)",
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=positive,
        help="(default: 1; for --throughput the best of each engine)",
    )
    parser.add_argument("--threads", type=positive, help="(default: PyTorch's)")
    add_size(parser)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="timed seconds a configuration (default: 2)"
    )
    parser.add_argument(
        "--throughput",
        action="store_true",
        help="images a second, each engine with the batch size and streams that suit it best",
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
    parser.add_argument("--output", type=folder, metavar="DIR", help="folder for files")


def _run(args: argparse.Namespace) -> int:
    """Print what was measured; exit code 1 where nothing was, or no model keeps to the budget."""
    if args.throughput and (args.front or args.budget is not None):
        raise ConfigError("--throughput does not go with --front and --budget, which are latency")
    return _front(args) if args.front or args.budget is not None else _benchmark(args)


def _benchmark(args: argparse.Namespace) -> int:
    if args.engine is not None:
        raise ConfigError("--engine is for --front and --budget; here it is --engines A,B")
    if not args.model:
        raise ConfigError("name a model, or a checkpoint, or add --front")
    if args.name is not None and not (len(args.model) == 1 and is_checkpoint(args.model[0])):
        raise ConfigError("--name is for one checkpoint that does not say which model it is of")
    reports = []
    with Bar() as bar:
        for model in args.model:
            measure = bench.throughput if args.throughput else bench.benchmark
            report = measure(
                args.name or model,
                checkpoint=model if args.name else None,
                overrides=_overrides(args, model),
                engines=None if args.engines is None else _listed(args.engines),
                precisions=_listed(args.precisions),
                progress=bar.show,
                **_conditions(args),
            )
            reports.append(report)
            if not args.json:
                bar.say(f"{report}\n")
    facts = [report.as_dict() for report in reports]
    tell(args, facts)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        file = write_json(args.output / "bench.json", facts)
        print(f"{file} holds this for programs", file=sys.stderr)
    return 0 if all(report.best is not None for report in reports) else 1


def _overrides(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return the number of classes for a name; that of a file is its own."""
    if args.num_classes is None:
        return {}
    if is_checkpoint(model):
        open_model(argparse.Namespace(model=model, name=args.name, num_classes=args.num_classes))
        return {}
    return {"num_classes": args.num_classes}


def _front(args: argparse.Namespace) -> int:
    for option in ("name", "num_classes", "engines"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} does not go with --front and --budget")
    precisions = _listed(args.precisions)
    if len(precisions) != 1:
        raise ConfigError("a front is of one precision; give --precisions one")
    budget = None if args.budget is None else bench.parse_budget(args.budget)
    with Bar() as bar:
        front = bench.front(
            args.model or None,
            engine=args.engine or "auto",
            precision=precisions[0],
            budget_ms=budget,
            progress=bar.show,
            **_conditions(args),
        )
    choice = None if budget is None else bench.within(front.rows, budget)
    chosen = [f"\n{choice}"] if choice is not None and choice.best is not None else []
    tell(args, bench.front_as_dict(front, choice), front, *chosen)
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
    return {
        "batch_size": args.batch_size if args.throughput else args.batch_size or 1,
        "threads": args.threads,
        "input_size": asked_size(args),
        "seconds": args.seconds,
        "calibration": args.calibration,
    }


def _listed(words: list[str]) -> list[str]:
    """Return the parts of ``a,b``, ``a b`` and ``a, b``."""
    return [part.strip() for word in words for part in word.split(",") if part.strip()]
