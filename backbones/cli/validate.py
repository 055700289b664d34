"""``backbones validate``."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from backbones.cli.parsing import command, json_flag, label_names, open_model, positive
from backbones.engines import file_suffixes, open_exported
from backbones.errors import ConfigError
from backbones.train import set_input, validate, write_validation

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command(
        commands,
        "validate",
        "measure a model's accuracy on a folder of images",
        "backbones validate --data-dir flowers --checkpoint model_best.safetensors\n"
        "         backbones validate --data-dir flowers --checkpoint model.onnx\n"
        "         backbones validate --data-dir imagenet --model lsnet_t --reparam",
    )
    parser.add_argument("data", nargs="?", metavar="DIR", help="the same as --data-dir")
    parser.add_argument("--data-dir", help="folder: <split>/<class>/<image>, or <class>/<image>")
    parser.add_argument("--split", default="validation", help="(default: %(default)s)")
    parser.add_argument("--model", help="name (default: the checkpoint's)")
    parser.add_argument(
        "--checkpoint",
        help=f"weights, or an exported file ({', '.join(file_suffixes())});"
        " without it the model's released weights are taken",
    )
    parser.add_argument("--reparam", action="store_true", help="re-parameterize the model first")
    parser.add_argument("-b", "--batch-size", type=positive, default=64, help="(default: 64)")
    parser.add_argument("-j", "--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--img-size", type=positive, help="pixels a side (default: the model's)")
    parser.add_argument("--crop-pct", type=float, help="share of the image that is kept")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="(default: PyTorch's)")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for metrics, tables and a picture"
    )
    json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print top-1, top-5 and loss, and the classes with the lowest accuracy."""
    folder = args.data_dir or args.data
    if not folder:
        raise ConfigError("name the folder of images (--data-dir FOLDER)")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    exported = args.checkpoint and Path(args.checkpoint).suffix in file_suffixes()
    model, data_config, classes, num_classes = (_exported if exported else _module)(args)
    result = validate(
        model,
        folder,
        data_config,
        split=args.split,
        classes=classes,
        num_classes=num_classes,
        batch_size=args.batch_size,
        workers=args.workers,
        skip_bad=args.skip_bad,
        device=torch.device(args.device),
    )
    written = write_validation(result, args.output) if args.output else []
    if args.json:
        print(json.dumps(result.as_dict()))
        return 0
    print(result)
    if written:
        print(f"{args.output} holds {', '.join(path.name for path in written)}")
    return 0


Loaded = tuple[Callable[[Tensor], Tensor], dict[str, Any], list[str] | None, int | None]


def _module(args: argparse.Namespace) -> Loaded:
    arguments = {"deploy": True} if args.reparam else {}
    model = open_model(args.model, args.checkpoint, **arguments)
    set_input(model, args.img_size, crop_pct=args.crop_pct)
    model.to(args.device)
    return model, resolve_model_data_config(model), label_names(model), model.num_classes  # type: ignore[return-value]


def _exported(args: argparse.Namespace) -> Loaded:
    if args.reparam or args.model or args.img_size:
        raise ConfigError(
            f"{args.checkpoint} is exported and says itself what it is; leave out --model,"
            " --reparam and --img-size"
        )
    runner = open_exported(args.checkpoint, threads=args.threads)
    metadata = runner.metadata
    if not metadata.get("input"):
        raise ConfigError(f"{args.checkpoint} does not say how images are prepared for it")
    data_config = dict(metadata["input"])
    if args.crop_pct is not None:
        data_config["crop_pct"] = args.crop_pct
    return runner, data_config, metadata.get("classes"), None
