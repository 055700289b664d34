"""``backbones reparam``."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import backbones
from backbones.cli.parsing import command, json_flag, require_file
from backbones.errors import ConfigError, UnsupportedError
from backbones.factory import open_checkpoint
from backbones.reparameterization import reparameterize_with_report
from backbones.skeleton import StagedBackbone
from backbones.weights import read_checkpoint

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command(
        commands,
        "reparam",
        "merge everything in a checkpoint that can be merged exactly",
        "backbones reparam model.safetensors deploy.safetensors\n"
        "         backbones reparam lsnet_t.pth lsnet_t_deploy.safetensors --model lsnet_t",
    )
    parser.add_argument("input", metavar="IN", help="checkpoint of the training form")
    parser.add_argument("output", metavar="OUT", help="safetensors file to write")
    parser.add_argument(
        "--model", help="model name (default: the checkpoint's, where it says which)"
    )
    json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the re-parameterized form and print what was merged."""
    require_file(args.input, "IN")
    checkpoint = read_checkpoint(args.input)
    if checkpoint.deploy:
        raise ConfigError(f"{args.input} is re-parameterized already; there is nothing to merge")
    if Path(args.output).exists() and Path(args.output).samefile(args.input):
        raise ConfigError(f"{args.output}: would replace the training form; name another file")
    opened = open_checkpoint(checkpoint, args.model)
    merged, report = reparameterize_with_report(opened.model)
    if not isinstance(merged, StagedBackbone):
        raise UnsupportedError(
            f"{opened.name} is a model of timm that this package has no deploy form of: a file of"
            " it could not be loaded again. Use backbones.reparameterize(model) in Python"
        )
    path = backbones.save_checkpoint(
        merged,
        args.output,
        license=opened.saved.get("license"),
        provenance=opened.saved.get("provenance") or {"merged from": Path(args.input).name},
        classes=opened.saved.get("classes"),
    )
    if args.json:
        print(json.dumps({"path": str(path), **dataclasses.asdict(report)}))
    else:
        print(f"{report}\nwrote {path}")
    return 0
