"""How a model enters a command: its name or file, and what the file does not say."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

import backbones
from backbones.cli.parsing import Parser, positive
from backbones.engines import Runner, file_suffixes, open_exported
from backbones.errors import ConfigError
from backbones.factory import is_checkpoint, open_checkpoint
from backbones.images import read_names
from backbones.train import set_input

__all__ = [
    "add_model",
    "add_size",
    "asked_size",
    "is_exported",
    "open_model",
    "open_runner",
    "open_with_facts",
    "read_class_names",
    "refuse_same",
    "require_file",
    "set_size",
]


def add_model(parser: Parser, *, also: str = "", names: bool = True, **options: Any) -> None:
    """Add ``MODEL`` and what a checkpoint does not say itself.

    `also` says what else the command takes as a model, `names` whether those of classes matter.
    """
    parser.add_argument(
        "model",
        **{"metavar": "MODEL", **options},
        help="a checkpoint's path, or a name (also with tag, of a YAML file, hf-hub:..., or"
        f" local-dir:...){also}",
    )
    parser.add_argument("--name", help="model of a checkpoint that does not say which it is of")
    parser.add_argument(
        "--num-classes",
        type=positive,
        metavar="N",
        help="refuse weights of another number of classes; number of those of fresh weights",
    )
    if names:
        parser.add_argument(
            "--class-names",
            metavar="FILE",
            help="names of the classes, one a line, where the checkpoint does not say them",
        )


def open_model(args: argparse.Namespace, **overrides: Any) -> nn.Module:
    """Return ``MODEL`` in evaluation mode: a checkpoint's, or a name's with released weights."""
    return open_with_facts(args, **overrides)[0]


def open_with_facts(
    args: argparse.Namespace, **overrides: Any
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return also what a checkpoint of this package says of itself."""
    saved: Mapping[str, Any] = {}
    if is_checkpoint(args.model):
        require_file(args.model)
        opened = open_checkpoint(args.model, args.name, **overrides)
        model, saved = opened.model, opened.saved
    elif Path(args.model).is_dir() and not timm.is_model(args.model):
        raise ConfigError(
            f"{args.model} is a folder; name a checkpoint in it, or local-dir:{args.model} where"
            " timm or this package saved a model for the Hub"
        )
    elif args.name is not None:
        raise ConfigError(f"--name is for a checkpoint, and {args.model} is none; leave it out")
    else:
        model = backbones.create_model(args.model, **{"pretrained": True, **overrides}).eval()
    found = getattr(model, "num_classes", None)
    if args.num_classes not in (None, found):
        raise ConfigError(f"--num-classes {args.num_classes}: {args.model} has {found} classes")
    if names := read_class_names(getattr(args, "class_names", None), found):
        cfg: Any = model.pretrained_cfg
        cfg["label_names"] = names
    return model, saved


def is_exported(args: argparse.Namespace) -> bool:
    """Tell whether ``MODEL`` is an exported file, by its suffix."""
    return Path(args.model).suffix in file_suffixes()


def open_runner(args: argparse.Namespace, *also: str) -> Runner:
    """Open the exported file ``MODEL``, which says itself what options say of other models.

    `also` are further options that it cannot have.
    """
    options = ("name", "img_size", "input_size", "num_classes", *also)
    if any(getattr(args, option) for option in options):
        named = ", ".join(f"--{option.replace('_', '-')}" for option in options)
        raise ConfigError(f"{args.model} is exported and says itself what it is; leave out {named}")
    runner = open_exported(args.model, threads=args.threads)
    known = runner.metadata.get("classes")
    if names := read_class_names(args.class_names, known and len(known)):
        runner.metadata["classes"] = names
    return runner


def refuse_same(source: str, target: str) -> None:
    """Refuse to write a file over the one that it is made of."""
    if Path(source).exists() and Path(target).exists() and Path(target).samefile(source):
        raise ConfigError(f"{target}: would replace its own source; name another file")


def require_file(path: str) -> None:
    """Refuse a path that names no file."""
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}; check the path of the checkpoint")


def read_class_names(path: str | None, count: int | None) -> list[str] | None:
    """Return the `count` names in a file, one a line; None where no file is given."""
    if path is None:
        return None
    names = read_names(path)
    if "" in names:
        raise ConfigError(f"{path}, line {names.index('') + 1}: no name; give one a line")
    if count is not None and len(names) != count:
        raise ConfigError(f"{path} names {len(names)} classes, the model has {count}")
    return names


def add_size(parser: Parser) -> None:
    """Add both spellings of the size of images."""
    parser.add_argument(
        "--img-size",
        type=positive,
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width (default: the model's)",
    )
    parser.add_argument(
        "--input-size",
        type=positive,
        nargs=3,
        metavar=("C", "H", "W"),
        help="the same as timm spells it: channels, height, width",
    )


def asked_size(args: argparse.Namespace) -> tuple[int, ...] | None:
    """Return ([channels,] height, width), where an option says them."""
    if args.img_size is None:
        return None if args.input_size is None else tuple(args.input_size)
    if args.input_size is not None:
        raise ConfigError("--img-size and --input-size say the same; give one of them")
    if len(args.img_size) > 2:
        raise ConfigError(
            "--img-size takes one or two numbers, a side or height and width,"
            f" got {len(args.img_size)}"
        )
    return (args.img_size[0], args.img_size[-1])


def set_size(model: nn.Module, args: argparse.Namespace) -> None:
    """Have a model's own preprocessing give images of the size asked for."""
    size = asked_size(args)
    if size is None:
        return
    *channels, height, width = size
    known = getattr(model, "in_chans", None) or 3
    if channels not in ([], [known]):
        raise ConfigError(f"the model takes images of {known} channels, not of {channels[0]}")
    set_input(model, (height, width))
