"""Parts of parsers that several commands share, and how a model enters a command."""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

import backbones
from backbones.errors import ConfigError

__all__ = ["command", "json_flag", "label_names", "open_model", "positive", "require_file"]


def command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Add a command whose help ends with an example."""
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def json_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs to read")


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def require_file(path: str, option: str = "--checkpoint") -> None:
    """Refuse a path that names no file, by the option it was given as."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; check the path given as {option}")


def open_model(name: str | None, checkpoint: str | None, **overrides: Any) -> nn.Module:
    """Return a model in evaluation mode: a checkpoint's, or a name's with its released weights."""
    if checkpoint is not None:
        require_file(checkpoint)
        return backbones.load_model(checkpoint, name, **overrides)
    if name is None:
        raise ConfigError("name a model (--model) or a checkpoint (--checkpoint)")
    return backbones.create_model(name, pretrained=True, **overrides).eval()


def label_names(model: nn.Module) -> list[str] | None:
    """Return the names of a model's classes, where its checkpoint said them."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("label_names")
