"""The command ``backbones``: parses, calls the API, prints.

Exit codes: 0 all is well; 1 the job failed; 2 wrong usage or bad input; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from huggingface_hub.utils import disable_progress_bars

import backbones
from backbones.cli import (
    bench,
    export,
    models,
    predict,
    quickstart,
    reparam,
    train,
    validate,
    weights,
)
from backbones.cli.parsing import Parser
from backbones.errors import (
    BackbonesError,
    CheckpointError,
    ConfigError,
    DataError,
    InputSizeError,
    UnknownModelError,
    UnsupportedError,
)

__all__ = ["main"]

COMMANDS = (models, predict, train, validate, reparam, export, bench, weights, quickstart)
BAD_INPUT = (
    CheckpointError,
    ConfigError,
    DataError,
    InputSizeError,
    UnknownModelError,
    UnsupportedError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="backbones",
        description="Efficient vision backbones: list, describe, try out, train and export them.",
        epilog="example: backbones quickstart\n"
        "exit codes: 0 all is well; 1 the job failed; 2 wrong usage or bad input",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=backbones.__version__)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for module in COMMANDS:
        module.add_parser(commands)
    args = parser.parse_args(argv)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (BackbonesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) else 1
