"""``backbones quickstart``."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from backbones import quickstart
from backbones.cli.parsing import command, positive
from backbones.cli.progress import Bar

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Describe the command."""
    default = quickstart.QuickstartConfig()
    parser = command(
        commands,
        "quickstart",
        _run,
        "train a small model on handwritten digits, check it, export it and compare",
        "backbones quickstart --output quickstart-output",
    )
    parser.add_argument("--model", default=default.model, help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=default.output, help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=positive, default=default.epochs, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=positive, default=default.size, help="pixels a side (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=default.batch_size, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--lr", type=float, default=default.lr, help="learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="of training (default: %(default)s)"
    )
    parser.add_argument("--limit", type=positive, help="use only that many images (default: all)")
    parser.add_argument(
        "--min-top1",
        type=float,
        default=default.min_top1,
        help="percent of held-out images to get right, else exit code 1 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, help="(default: PyTorch's)")


def _run(args: argparse.Namespace) -> int:
    """Run the main job; exit code 1 where validation stays below the bar."""
    names = [field.name for field in dataclasses.fields(quickstart.QuickstartConfig)]
    config = quickstart.QuickstartConfig(**{name: getattr(args, name) for name in names})
    with Bar() as bar:
        report = quickstart.run(config, bar.say, bar.update)
    files = ", ".join(quickstart.RESULTS)
    print(f"{config.output} holds {files}, after {report['seconds']:.0f} s in all")
    if not report["passed"]:
        print(
            f"error: {report['top1']:.2f} % of the held-out images are right, below the"
            f" {report['min_top1']} % asked for; train longer with --epochs or lower --min-top1",
            file=sys.stderr,
        )
        return 1
    return 0
