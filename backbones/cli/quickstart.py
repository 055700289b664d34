"""``backbones quickstart``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from backbones import quickstart
from backbones.cli.parsing import command, positive
from backbones.cli.progress import Bar

__all__ = ["add_parser"]

OPTIONS: dict[str, tuple[Any, str]] = {
    "model": (str, "model to fine-tune"),
    "output": (Path, "folder of the results"),
    "epochs": (positive, "passes over the images"),
    "size": (positive, "pixels a side"),
    "batch_size": (positive, "images a step"),
    "lr": (float, "learning rate"),
    "seed": (int, "of training"),
    "limit": (positive, "use only that many images"),
    "min_top1": (float, "percent of held-out images to get right, else exit code 1"),
    "threads": (positive, "of PyTorch"),
}


def add_parser(commands: Any) -> None:
    """Describe the command; its options are the fields of `QuickstartConfig`."""
    parser = command(
        commands,
        "quickstart",
        _run,
        "train a small model on handwritten digits, check it, export it and compare",
        "backbones quickstart --output quickstart-output",
        json=False,
    )
    for name, (kind, what) in OPTIONS.items():
        default = getattr(quickstart.QuickstartConfig, name)
        shown = f"{what} (default: %(default)s)" if default is not None else what
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default, help=shown)


def _run(args: argparse.Namespace) -> int:
    """Run the main job; exit code 1 where validation stays below the bar."""
    config = quickstart.QuickstartConfig(**{name: getattr(args, name) for name in OPTIONS})
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
