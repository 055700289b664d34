"""``backbones weights convert`` and ``backbones weights push``."""

import argparse
import secrets
import tempfile
from pathlib import Path
from typing import Any

import torch

import backbones
from backbones import weights
from backbones.cli.opening import refuse_same, require_file
from backbones.cli.parsing import command, tell
from backbones.conversion import Conversion, read_for_release

__all__ = ["add_parsers"]

DTYPES = ("float32", "float16", "bfloat16")


def add_parsers(verbs: Any) -> None:
    """Describe the verbs."""
    parser = command(
        verbs,
        "convert",
        _convert,
        "rewrite a checkpoint of any layout as safetensors in this package's",
        "backbones weights convert lsnet_t.pth lsnet_t.safetensors --name lsnet_t.in1k",
        "backbones weights convert m.safetensors small.safetensors --dtype float16",
    )
    parser.add_argument("input", metavar="IN", help="checkpoint of any known layout and wrapper")
    parser.add_argument("output", metavar="OUT", help="safetensors file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="number type (default: the file's)")
    _common(parser)
    parser = command(
        verbs,
        "push",
        _push,
        "publish a checkpoint on the Hugging Face Hub, for timm and this package to load",
        "backbones weights push model.safetensors me/my-model --license apache-2.0",
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
    _common(parser)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name",
        metavar="NAME[.TAG]",
        help="model name, with the tag where the file is that release (default: the checkpoint's)",
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="refuse a file of another number of classes"
    )
    parser.add_argument("--in-chans", type=int, metavar="N", help="likewise of input channels")
    parser.add_argument("--license", help="license of the weights, where no tag says it")


def _convert(args: argparse.Namespace) -> int:
    """Load strictly, write, and print what was found."""
    path = Path(args.output)
    refuse_same(args.input, args.output)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    found = _read(args, dtype=dtype, rewritten=True)
    weights.save_checkpoint(found.model, path, **found.beside)
    return _report(args, {"path": str(path), "sha256": weights.sha256_of(path), **found.facts})


def _push(args: argparse.Namespace) -> int:
    """Load strictly, then upload, or with ``--dry-run`` write the folder and leave it there."""
    weights.check_repo_id(args.repo_id)
    found = _read(args)
    if args.dry_run:
        folder = weights.save_for_hf(
            found.model,
            Path(tempfile.gettempdir()) / f"backbones-{secrets.token_hex(8)}",
            repo_id=args.repo_id,
            **found.beside,
        )
        sizes = {name: (folder / name).stat().st_size for name in weights.FILES}
        facts = {"would go to": args.repo_id, "folder": str(folder), "files": sizes}
    else:
        address = weights.push_to_hub(
            found.model,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            replace_card=args.replace_card,
            **found.beside,
        )
        facts = {"repository": args.repo_id, "commit": address}
    return _report(args, {**facts, **found.facts})


def _read(args: argparse.Namespace, **options: Any) -> Conversion:
    require_file(args.input)
    return read_for_release(
        args.input,
        args.name,
        license=args.license,
        version=backbones.__version__,
        num_classes=args.num_classes,
        in_chans=args.in_chans,
        **options,
    )


def _report(args: argparse.Namespace, facts: dict[str, Any]) -> int:
    tell(args, facts, *(f"{key:<12} {value}" for key, value in facts.items() if value is not None))
    return 0
