"""``backbones reparam``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import backbones
from backbones.cli.parsing import command, json_flag
from backbones.cli.saved import describe, model_name, overrides_of
from backbones.errors import ConfigError, UnsupportedError
from backbones.foreign import reparameterize_with_report
from backbones.skeleton import StagedBackbone

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
    """Write the deploy form and print what was merged."""
    saved = describe(args.input, "IN")
    name = model_name(args.model, saved, args.input)
    if saved.get("deploy"):
        raise ConfigError(f"{args.input} is in deploy form already; there is nothing to merge")
    if Path(args.output).exists() and Path(args.output).samefile(args.input):
        raise ConfigError(f"{args.output}: would replace the training form; name another file")
    model = backbones.create_model(name, checkpoint_path=args.input, **overrides_of(saved, name))
    merged, report = reparameterize_with_report(model.eval())
    if not isinstance(merged, StagedBackbone):
        raise UnsupportedError(
            f"{name} is a model of timm that this package has no deploy form of: a file of it could"
            " not be loaded again. Use backbones.reparameterize(model) in Python"
        )
    ours = saved if saved.get("name") == name else {}
    cfg: Any = merged.pretrained_cfg
    cfg.update(ours.get("input") or {})
    path = backbones.save_checkpoint(
        merged,
        args.output,
        license=ours.get("license"),
        provenance=ours.get("provenance") or {"merged from": Path(args.input).name},
        classes=ours.get("classes"),
    )
    if args.json:
        print(json.dumps({"path": str(path), **dataclasses.asdict(report)}))
    else:
        print(f"{report}\nwrote {path}")
    return 0
