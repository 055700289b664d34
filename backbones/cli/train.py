"""``backbones train``."""

import argparse
import dataclasses
import os
import shlex
import types
import typing
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from backbones import train
from backbones.cli.parsing import Parser, command
from backbones.cli.progress import Bar
from backbones.train import BEST, TrainConfig

__all__ = ["add_parser"]

SHORT = {"batch_size": ["-b"], "workers": ["-j"], "validation_batch_size": ["-vb"]}


def add_parser(commands: Any) -> None:
    """Describe the command; its options are the fields of `TrainConfig`."""
    parser = command(
        commands,
        "train",
        _run,
        "fine-tune a model on a folder of images",
        "backbones train --data-dir flowers --model lsnet_t",
        "backbones train --resume output/train/RUN/last.pth.tar",
        "torchrun --nproc-per-node 2 scripts/train.py --data-dir flowers --model lsnet_t",
        json=False,
    )
    parser.add_argument("data", nargs="?", metavar="DIR", help="the same as --data-dir")
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of options")
    parser.add_argument("--resume", metavar="FILE", help="go on with the run of a checkpoint")
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        _add_option(parser, field, hints[field.name])


def _run(args: argparse.Namespace) -> int:
    """Train; exit code 0 when all epochs are done."""
    fields = TrainConfig.__dataclass_fields__
    given = {key: value for key, value in vars(args).items() if key in fields}
    if args.data:
        given.setdefault("data_dir", args.data)
    options = {**(train.read_options(args.config) if args.config else {}), **given}
    with Bar() as bar:
        report = train.run(
            say=bar.say, progress=bar.update, checking=bar.check, resume=args.resume, **options
        )
    if int(os.environ.get("RANK", "0")) == 0:
        print(report)
        print(f"try it: backbones predict {shlex.quote(str(report.folder / BEST))} IMAGE")
    return 0


def _add_option(parser: Parser, field: Any, hint: Any) -> None:
    flags = [*SHORT.get(field.name, ()), "--" + field.name.replace("_", "-")]
    shown = "" if field.default in (None, "", dataclasses.MISSING) else f" ({field.default})"
    options: dict[str, Any] = {
        # What is not given is left to the recipe.
        "default": argparse.SUPPRESS,
        "help": (field.metadata["help"] + shown).replace("%", "%%"),
        "dest": field.name,
    }
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = [p for p in typing.get_args(hint) if p is not type(None)] if union else [hint]
    kind = parts[-1]  # of a number or numbers, several may be given
    if field.name == "channels_last":
        flags.append("--no-channels-last")
        options |= {"nargs": "?", "action": _Layout, "metavar": "auto"}
        parser.add_argument(*flags, accepts=lambda word: word == "auto", **options)
    elif kind is bool:
        switch = "store_true" if field.name.startswith("no_") else argparse.BooleanOptionalAction
        parser.add_argument(*flags, action=switch, **options)
    elif typing.get_origin(kind) is dict:
        options |= {"nargs": "*", "action": _KeyValues, "metavar": "KEY=VALUE"}
        parser.add_argument(*flags, accepts=lambda word: "=" in word, **options)
    elif typing.get_origin(kind) is typing.Literal:
        choices = [choice for part in parts for choice in typing.get_args(part)]
        parser.add_argument(*flags, choices=choices, **options)
    elif typing.get_origin(kind) is not None:
        item = typing.get_args(kind)[0]
        parser.add_argument(*flags, nargs="+", type=item, metavar="N", **options)
    elif field.name == "torchcompile":
        options |= {"nargs": "?", "const": "inductor", "metavar": "BACKEND"}
        parser.add_argument(*flags, accepts=lambda word: not Path(word).is_dir(), **options)
    else:
        metavar = "TEXT" if kind is str else "N"
        parser.add_argument(*flags, type=kind, metavar=metavar, **options)


class _Layout(argparse.Action):
    """``--channels-last``, ``--no-channels-last`` and ``--channels-last auto``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Set true, false or ``auto``."""
        wanted = not str(option_string).startswith("--no-")
        if values is not None and not wanted:
            raise argparse.ArgumentError(self, f"takes no value, got {values!r}")
        setattr(namespace, self.dest, wanted if values is None else values)


class _KeyValues(ParseKwargs):
    """timm's ``KEY=VALUE``, with a word about what is none."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Add the values to the namespace."""
        for value in values:
            if "=" not in value:
                raise argparse.ArgumentError(self, f"write KEY=VALUE, got {value!r}")
        super().__call__(parser, namespace, values, option_string)
