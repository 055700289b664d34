"""``backbones list``."""

import argparse
import json
import sys
from typing import Any

import backbones
from backbones.cli.parsing import command, json_flag

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command(
        commands, "list", "list the models", "backbones list 'convnext*' --pretrained --license mit"
    )
    parser.add_argument("filter", nargs="?", default="*", help="shell-style pattern of the name")
    parser.add_argument("--family", help="only this family")
    parser.add_argument(
        "--pretrained", action="store_true", help="names with tag of the weights to download"
    )
    parser.add_argument("--license", help="likewise, only weights under this license")
    json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print one name a line; exit code 1 where nothing matches."""
    names = backbones.list_models(
        args.filter, family=args.family, pretrained=args.pretrained, license=args.license
    )
    if args.json:
        print(json.dumps(names))
    elif names:
        print("\n".join(names))
    if not names:
        print("no model matches; `backbones list` shows all", file=sys.stderr)
        return 1
    return 0
