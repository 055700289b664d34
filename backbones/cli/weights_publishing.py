"""``backbones weights convert`` and ``backbones weights push``."""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

import backbones
from backbones import weights
from backbones.cli.parsing import command, json_flag
from backbones.cli.saved import describe, model_name
from backbones.errors import ConfigError, UnknownModelError
from backbones.factory import find_variant
from backbones.manifest import WeightsEntry, load_manifest
from backbones.registry import registry, unknown
from backbones.weights.download.disk import sha256_of
from backbones.weights.publish.pushing import FILES, check_repo_id

__all__ = ["add_parsers"]

DTYPES = ("float32", "float16", "bfloat16")


def add_parsers(verbs: Any) -> None:
    """Describe the verbs."""
    parser = command(
        verbs,
        "convert",
        "rewrite a checkpoint of any layout as safetensors in this package's",
        "backbones weights convert lsnet_t.pth lsnet_t.safetensors --model lsnet_t.in1k\n"
        "         backbones weights convert m.safetensors small.safetensors --dtype float16",
    )
    parser.add_argument("input", metavar="IN", help="checkpoint of any known layout and wrapper")
    parser.add_argument("output", metavar="OUT", help="safetensors file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="number type (default: the file's)")
    _common(parser, _convert)
    parser = command(
        verbs,
        "push",
        "publish a checkpoint on the Hugging Face Hub, for timm and this package to load",
        "backbones weights push model.safetensors me/my-model --license apache-2.0\n"
        "HF_TOKEN holds a token with the right to write.",
    )
    parser.add_argument("input", metavar="CHECKPOINT", help="checkpoint of any known layout")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="repository, made where needed")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where needed")
    parser.add_argument(
        "--replace-card", action="store_true", help="replace a model card that is there already"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="write what would be sent to a folder, send nothing"
    )
    _common(parser, _push)


def _common(parser: argparse.ArgumentParser, action: Any) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME[.TAG]",
        help="model name, with the tag where the file is that release (default: the checkpoint's)",
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="classes of the file, where not the model's"
    )
    parser.add_argument(
        "--in-chans", type=int, metavar="N", help="input channels of the file, likewise"
    )
    parser.add_argument("--license", help="license of the weights, where no tag says it")
    json_flag(parser)
    parser.set_defaults(run_verb=action)


@dataclass
class _Loaded:
    """A checkpoint as a model, and what is to be written beside the weights."""

    model: nn.Module
    facts: dict[str, Any]
    """Name, layout and the like, to print."""
    beside: dict[str, Any]
    """License, provenance and classes, as `save_checkpoint` and `push_to_hub` take them."""


def _convert(args: argparse.Namespace) -> int:
    """Load strictly, write, and print what was found."""
    path, source = Path(args.output), Path(args.input)
    if path.exists() and source.exists() and path.samefile(source):
        raise ConfigError(f"{path}: would replace its own source; name another file")
    loaded = _load(args, dtype=getattr(torch, args.dtype) if args.dtype else None, rewritten=True)
    weights.save_checkpoint(loaded.model, path, **loaded.beside)
    facts = {"path": str(path), "sha256": sha256_of(path), **loaded.facts}
    _report(facts, args.json)
    return 0


def _push(args: argparse.Namespace) -> int:
    """Load strictly, then upload, or with ``--dry-run`` write the folder and keep it."""
    check_repo_id(args.repo_id)
    loaded = _load(args)
    if args.dry_run:
        folder = weights.save_for_hf(
            loaded.model,
            Path(tempfile.gettempdir()) / f"backbones-{secrets.token_hex(8)}",
            repo_id=args.repo_id,
            **loaded.beside,
        )
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        facts = {"would go to": args.repo_id, "folder": str(folder), "files": sizes}
    else:
        address = weights.push_to_hub(
            loaded.model,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            replace_card=args.replace_card,
            **loaded.beside,
        )
        facts = {"repository": args.repo_id, "commit": address}
    _report({**facts, **loaded.facts}, args.json)
    return 0


def _load(
    args: argparse.Namespace, *, dtype: torch.dtype | None = None, rewritten: bool = False
) -> _Loaded:
    """Load ``args.input`` completely into the model it is of.

    Args:
        args: with input, model, num_classes, in_chans and license.
        dtype: number type of the model; None for the file's.
        rewritten: whether even a file of ours becomes another one, which names it as its source.

    Raises:
        ConfigError: the file does not say which model it is of, or the license is another one.
        UnknownModelError: no such model or tag in this package.
        CheckpointError: the file does not fit, or its values overflow the type.
    """
    saved = describe(args.input, "IN")
    name = model_name(args.model, saved, args.input)
    variant, tag = find_variant(name)
    if variant is None and name not in registry.classes:
        raise UnknownModelError(unknown("model of this package", name, registry.names()))
    entry = load_manifest().find(variant.name, tag) if variant is not None and tag else None
    ours = saved if saved.get("name") == (variant.name if variant else name) else {}
    overrides: dict[str, Any] = dict(ours.get("arguments") or {})
    if ours.get("deploy"):
        overrides["deploy"] = True
    for key in ("num_classes", "in_chans"):
        if getattr(args, key) is not None:
            overrides[key] = getattr(args, key)
    checkpoint = weights.read_checkpoint(args.input)
    # A family's name alone says nothing of sizes; those follow from the file.
    source = None if variant is not None else args.input
    model = backbones.create_model(name, checkpoint_path=source, **overrides).eval()
    model.to(dtype or _widest(checkpoint))
    if entry is not None and entry.lacks:
        report = weights.load_pretrained(model, args.input, lacks=entry.lacks)
    else:
        report = weights.load_checkpoint(model, checkpoint)
    cfg: Any = model.pretrained_cfg
    cfg.update(ours.get("input") or {})
    origin = ours.get("provenance")
    if rewritten or not ours:
        origin = _provenance(Path(args.input), report, entry, origin)
    license = _license(args.license, entry, ours.get("license"))
    facts = {
        "model": name,
        "layout": report.layout,
        "wrapper": report.wrapper,
        "entries": report.loaded,
        "dropped": len(report.dropped),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "license": license,
    }
    beside = {"license": license, "provenance": origin, "classes": ours.get("classes")}
    return _Loaded(model, facts, beside)


def _widest(checkpoint: weights.Checkpoint) -> torch.dtype:
    """Return the type that holds every number of a checkpoint."""
    types = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.is_floating_point()}
    # Nothing computes in 8 bits; all of these are float16 numbers.
    wide = [torch.float16 if dtype.itemsize == 1 else dtype for dtype in types]
    return reduce(torch.promote_types, wide) if wide else torch.float32


def _license(given: str | None, entry: WeightsEntry | None, saved: str | None) -> str:
    released = entry.license if entry is not None and entry.license != "unstated" else None
    if entry is not None and given and released and given.lower() != released:
        raise ConfigError(
            f"--license {given}: {entry.name} was released under {released}; leave the option out,"
            " or name the model without the tag where the weights are your own"
        )
    return released or given or saved or "unstated"


def _provenance(
    path: Path, report: weights.LoadReport, entry: WeightsEntry | None, before: Any
) -> dict[str, Any]:
    digest = sha256_of(path)
    facts: dict[str, Any] = {
        "converted from": path.name,
        "sha256": digest,
        "size": path.stat().st_size,
        "layout": report.layout,
        "wrapper": report.wrapper,
        "prefix": report.prefix or None,
        "by": f"backbones {backbones.__version__}",
    }
    if entry is not None:
        facts["release"] = entry.name
        facts["released at"] = entry.source
        if entry.sha256 is not None:
            facts["is the released file"] = digest == entry.sha256
        if entry.lacks:
            facts["lacks"] = list(entry.lacks)
    if before:
        facts["before"] = before
    return {key: value for key, value in facts.items() if value is not None}


def _report(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        if value is not None:
            print(f"{key:<12} {value}")
