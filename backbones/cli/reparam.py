"""``backbones reparam``."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import backbones
from backbones.cli.parsing import add_model, command, open_model, require_file, tell
from backbones.errors import ConfigError, UnsupportedError
from backbones.factory import is_checkpoint, open_checkpoint
from backbones.reparameterization import reparameterize_with_report
from backbones.skeleton import StagedBackbone
from backbones.weights import read_checkpoint

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "reparam",
        _run,
        "merge everything in a model that can be merged exactly",
        "backbones reparam model.safetensors deploy.safetensors",
        "backbones reparam lsnet_t.pth lsnet_t_deploy.safetensors --name lsnet_t",
    )
    add_model(parser)
    parser.add_argument("output", metavar="OUT", help="safetensors file to write")


def _run(args: argparse.Namespace) -> int:
    """Write the re-parameterized form and print what was merged."""
    saved: Any = {}
    if is_checkpoint(args.model):
        require_file(args.model)
        checkpoint = read_checkpoint(args.model)
        if checkpoint.deploy:
            raise ConfigError(
                f"{args.model} is re-parameterized already; there is nothing to merge"
            )
        if Path(args.output).exists() and Path(args.output).samefile(args.model):
            raise ConfigError(f"{args.output}: would replace the training form; name another file")
        opened = open_checkpoint(checkpoint, args.name)
        model, name, saved = opened.model, opened.name, opened.saved
    else:
        model, name = open_model(args), args.model
    merged, report = reparameterize_with_report(model)
    if not isinstance(merged, StagedBackbone):
        raise UnsupportedError(
            f"{name} is a model of timm that this package has no deploy form of: a file of"
            " it could not be loaded again. Use backbones.reparameterize(model) in Python"
        )
    path = backbones.save_checkpoint(
        merged,
        args.output,
        license=saved.get("license"),
        provenance=saved.get("provenance") or {"merged from": Path(args.model).name},
        classes=saved.get("classes"),
    )
    tell(args, {"path": str(path), **dataclasses.asdict(report)}, report, f"wrote {path}")
    return 0
