"""Parts of parsers that several commands share."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from itertools import chain
from json import dumps
from pathlib import Path
from typing import Any

import torch

from backbones.errors import first_line

__all__ = ["Parser", "command", "device", "folder", "natural", "positive", "share", "tell"]


class Parser(argparse.ArgumentParser):
    """A parser that takes operands anywhere, also right behind options of several values.

    Where argparse gives such an option all that follows, and wants operands that may be left out
    side by side, this one gives it what it can use: values of its type, or those for which the
    further argument `accepts` of `add_argument` holds. What it refuses is an operand, unless there
    are too many of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._options: dict[str, argparse.Action] = {}
        self._accepts: dict[str, Callable[[str], bool]] = {}
        self._most_operands: float = 0
        super().__init__(*args, **kwargs)

    def add_argument(  # type: ignore[override]
        self, *flags: str, accepts: Callable[[str], bool] | None = None, **options: Any
    ) -> argparse.Action:
        """Add an argument, of which `accepts` tells whether a word can be a value."""
        return self._noted(super().add_argument(*flags, **options), accepts)

    def add_argument_group(self, *titles: Any, **options: Any) -> Any:
        """Add a group, whose arguments are this parser's."""
        group = super().add_argument_group(*titles, **options)
        add = group.add_argument
        group.add_argument = lambda *flags, **kinds: self._noted(add(*flags, **kinds))  # type: ignore[method-assign]
        return group

    def _noted(
        self, action: argparse.Action, accepts: Callable[[str], bool] | None = None
    ) -> argparse.Action:
        self._options |= dict.fromkeys(action.option_strings, action)
        if accepts is not None:
            self._accepts[action.dest] = accepts
        if not action.option_strings:
            self._most_operands += _most_values(action)
        return action

    def add_subparsers(self, **options: Any) -> Any:
        """Add verbs, each of which sorts its own words."""
        self._most_operands = math.nan
        return super().add_subparsers(**options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse words, the operands last."""
        if args is not None and not math.isnan(self._most_operands):
            args = self._operands_last(list(args))
        return super().parse_known_args(args, namespace)

    def _operands_last(self, rest: list[str]) -> list[str]:
        options: list[list[str]] = []
        operands: list[str] = []
        refused: list[tuple[list[str], int]] = []
        while rest:
            word = rest.pop(0)
            if word == "--":
                operands += rest
                break
            if not self._is_flag(word):
                operands.append(word)
                continue
            option = [word]
            options.append(option)
            action = self._option(word)
            if action is None:
                continue
            while rest and len(option) <= _most_values(action) and self._is_word(rest[0]):
                first_of_many = action.nargs == "+" and len(option) == 1
                if not first_of_many and not self._takes(action, rest[0]):
                    refused.append((option, len(operands)))
                    break
                option.append(rest.pop(0))
        for option, place in reversed(refused):
            if len(operands) > self._most_operands:
                option.append(operands.pop(place))
        return [*chain(*options), *(["--", *operands] if operands else [])]

    def _option(self, word: str) -> argparse.Action | None:
        """Return the option of a flag that takes the words behind it; None for other flags."""
        flag, is_given, _ = word.partition("=")
        if is_given:
            return None
        if flag in self._options or not flag.startswith("--"):
            return self._options.get(flag)
        meant = {id(a): a for name, a in self._options.items() if name.startswith(flag)}
        return next(iter(meant.values())) if len(meant) == 1 else None

    def _is_flag(self, word: str) -> bool:
        if not word.startswith("-") or word == "-":
            return False
        if word.partition("=")[0] in self._options:
            return True
        try:
            float(word)
        except ValueError:
            return " " not in word
        return False

    def _is_word(self, word: str) -> bool:
        return word != "--" and not self._is_flag(word)

    def _takes(self, action: argparse.Action, word: str) -> bool:
        if not isinstance(action.nargs, str):
            return True
        if action.dest in self._accepts:
            return self._accepts[action.dest](word)
        try:
            return action.type is None or bool([action.type(word)])  # type: ignore[operator]
        except (ValueError, argparse.ArgumentTypeError):
            return False


def _most_values(action: argparse.Action) -> float:
    """Return how many words an argument takes at most."""
    if action.nargs in ("*", "+"):
        return math.inf
    return action.nargs if isinstance(action.nargs, int) else 1


def command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    summary: str,
    *examples: str,
    json: bool = True,
) -> Parser:
    """Add a command that calls `run` (None: its verbs do), and whose help ends with examples."""
    parser: Parser = commands.add_parser(
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


def natural(text: str) -> int:
    """Parse an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def share(text: str) -> float:
    """Parse a number above 0 and of at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def device(text: str) -> torch.device:
    """Parse a device that this machine has."""
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {first_line(error)}") from error


def folder(text: str) -> Path:
    """Parse a folder that is there, or can be made."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to; name another folder")
    return path
