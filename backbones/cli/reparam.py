"""``backbones reparam``."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import backbones
from backbones.cli.opening import (
    add_model,
    add_size,
    open_with_facts,
    refuse_same,
    set_size,
)
from backbones.cli.parsing import command, tell
from backbones.errors import ConfigError, UnsupportedError
from backbones.factory import label_names
from backbones.reparameterization import reparameterize_with_report
from backbones.skeleton import StagedBackbone

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
    add_size(parser)


def _run(args: argparse.Namespace) -> int:
    """Write the re-parameterized form and print what was merged."""
    refuse_same(args.model, args.output)
    model, saved = open_with_facts(args)
    if getattr(model, "deployed", False):
        raise ConfigError(f"{args.model} is re-parameterized already; there is nothing to merge")
    set_size(model, args)
    merged, report = reparameterize_with_report(model)
    if not isinstance(merged, StagedBackbone):
        raise UnsupportedError(
            f"{args.model} is a model of timm that this package has no deploy form of: a file of"
            " it could not be loaded again. Use backbones.reparameterize(model) in Python"
        )
    path = backbones.save_checkpoint(
        merged,
        args.output,
        license=saved.get("license"),
        provenance=saved.get("provenance") or {"merged from": Path(args.model).name},
        classes=label_names(model),
    )
    tell(args, {"path": str(path), **dataclasses.asdict(report)}, report, f"wrote {path}")
    return 0
