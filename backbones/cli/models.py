"""``backbones list`` and ``backbones info``."""

import argparse
import dataclasses
import sys
from typing import Any

import timm
from timm.data import resolve_model_data_config

import backbones
from backbones.cli.opening import add_model, open_model
from backbones.cli.parsing import command, tell
from backbones.factory import REMOTE, find_variant, is_checkpoint, label_names
from backbones.info import count_parameters

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Describe both commands."""
    parser = command(
        commands,
        "list",
        _list,
        "list the models",
        "backbones list 'convnext*' --pretrained --license mit",
    )
    parser.add_argument("filter", nargs="?", default="*", help="shell-style pattern of the name")
    parser.add_argument("--family", help="only this family")
    parser.add_argument(
        "--pretrained", action="store_true", help="names with tag of the weights to download"
    )
    parser.add_argument("--license", help="likewise, only weights under this license")
    parser = command(
        commands,
        "info",
        _info,
        "describe a model and its weights",
        "backbones info convnext_tiny",
        "backbones info model_best.safetensors",
    )
    add_model(parser, names=False)


def _list(args: argparse.Namespace) -> int:
    """Print one name a line; exit code 1 where nothing matches."""
    names = backbones.list_models(
        args.filter, family=args.family, pretrained=args.pretrained, license=args.license
    )
    tell(args, names, *names)
    if not names:
        print("no model matches; `backbones list` shows all", file=sys.stderr)
        return 1
    return 0


def _info(args: argparse.Namespace) -> int:
    """Print size, cost, origin and weights of a model, or what a checkpoint holds."""
    if args.name is not None or is_checkpoint(args.model) or args.model.startswith(REMOTE):
        return _describe(open_model(args), args)
    if timm.is_model(args.model) and find_variant(args.model)[0] is None:
        return _describe(open_model(args, pretrained=False), args)
    info = backbones.model_info(args.model)
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
    lines = [f"{label:<14} {value}" for label, value in rows.items() if value]
    lines.append("weights" if info.weights else "weights        none were released")
    for entry in info.weights:
        top1 = f"{entry.top1} % top-1" if entry.top1 is not None else "accuracy not published"
        state = "" if entry.available else f" [{entry.status}]"
        lines.append(f"  {entry.tag:<26} {top1}, license {entry.license}, {entry.source}{state}")
    tell(args, {**dataclasses.asdict(info), "macs": info.macs, "tags": info.tags}, *lines)
    return 0


def _describe(model: Any, args: argparse.Namespace) -> int:
    """Print what a model of a file, of the Hub or of timm is."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    classes = label_names(model)
    facts = {
        "name": args.name or cfg.get("architecture"),
        "parameters": count_parameters(model),
        "input size": list(resolve_model_data_config(model)["input_size"]),
        "classes": model.num_classes,
        "class names": classes and list(classes),
        "re-parameterized": bool(getattr(model, "deployed", False)),
        "license": cfg.get("license"),
    }
    lines = [f"{label:<16} {value}" for label, value in facts.items() if value is not None]
    tell(args, facts, *lines)
    return 0
