"""Parts of parsers that several commands share, and how a model enters a command."""

import argparse
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Any

from torch import nn

import backbones
from backbones.errors import ConfigError
from backbones.factory import is_checkpoint

__all__ = [
    "add_model",
    "command",
    "label_names",
    "open_model",
    "positive",
    "require_file",
    "tell",
]


def command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    summary: str,
    *examples: str,
    json: bool = True,
) -> argparse.ArgumentParser:
    """Add a command that calls `run` (None: its verbs do), and whose help ends with examples."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="example: " + "\n         ".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON for programs to read")
    return parser


def tell(args: argparse.Namespace, facts: Any, *lines: Any) -> None:
    """Print facts for programs where ``--json`` asks for it, else lines for people."""
    for line in [dumps(facts, default=list)] if args.json else lines:
        print(line)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def require_file(path: str) -> None:
    """Refuse a path that names no file."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; check the path of the checkpoint")


def add_model(parser: argparse.ArgumentParser, *, also: str = "", **options: Any) -> None:
    """Add ``MODEL`` and what a checkpoint does not say itself.

    Args:
        parser: of the command.
        also: what else the command takes as a model.
        options: further arguments of `add_argument`.
    """
    parser.add_argument(
        "model",
        **{"metavar": "MODEL", **options},
        help="a checkpoint's path, or a name (also with tag, of a YAML file, hf-hub:..., or"
        f" local-dir:...){also}",
    )
    parser.add_argument("--name", help="model of a checkpoint that does not say which it is of")


def open_model(args: argparse.Namespace, **overrides: Any) -> nn.Module:
    """Return ``MODEL`` in evaluation mode: a checkpoint's, or a name's with released weights."""
    if is_checkpoint(args.model):
        require_file(args.model)
        return backbones.load_model(args.model, args.name, **overrides)
    if args.name is not None:
        raise ConfigError(f"--name is for a checkpoint, and {args.model} is none; leave it out")
    return backbones.create_model(args.model, **{"pretrained": True, **overrides}).eval()


def label_names(model: nn.Module) -> list[str] | None:
    """Return the names of a model's classes, where its checkpoint said them."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("label_names")
