"""``backbones info``."""

import argparse
import dataclasses
import json
from typing import Any

import backbones
from backbones.cli.parsing import command, json_flag

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command(
        commands, "info", "describe a model and its weights", "backbones info convnext_tiny"
    )
    parser.add_argument("name", help="a model, with or without tag, or a YAML file")
    json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print size, cost, origin and weights of a model."""
    info = backbones.model_info(args.name)
    if args.json:
        facts = {**dataclasses.asdict(info), "macs": info.macs, "tags": info.tags}
        print(json.dumps(facts, default=list))
        return 0
    rows = {
        "name": info.name,
        "family": info.family,
        "parameters": f"{info.params / 1e6:.2f} M",
        "multiply-adds": f"{info.macs / 1e9:.3f} G at {' x '.join(map(str, info.input_size))}",
        "arguments": ", ".join(f"{key}={value}" for key, value in info.arguments.items()),
        "aliases": ", ".join(info.aliases),
        "name in timm": info.timm_name,
    }
    if info.source is not None:
        rows["paper"] = f"{info.source.title}, {info.source.paper}"
        rows["code"] = f"{info.source.repository} ({info.source.license})"
    for label, value in rows.items():
        if value:
            print(f"{label:<14} {value}")
    print("weights" if info.weights else "weights        none were released")
    for entry in info.weights:
        top1 = f"{entry.top1} % top-1" if entry.top1 is not None else "accuracy not published"
        state = "" if entry.available else f" [{entry.status}]"
        print(f"  {entry.tag:<26} {top1}, license {entry.license}, {entry.source}{state}")
    return 0
