"""``backbones validate``."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor
from tqdm import tqdm

from backbones.cli.opening import (
    add_model,
    add_size,
    is_exported,
    open_model,
    open_runner,
    set_size,
)
from backbones.cli.parsing import command, device, folder, natural, positive, share, tell
from backbones.engines import file_suffixes
from backbones.errors import ConfigError
from backbones.factory import label_names
from backbones.train import probe, set_input, validate, write_validation

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "validate",
        _run,
        "measure a model's accuracy on a folder of images",
        "backbones validate model_best.safetensors --data-dir flowers",
        "backbones validate model.onnx --data-dir flowers",
        "backbones validate lsnet_t --data-dir imagenet --reparam",
        "backbones validate lsnet_t --data-dir flowers --probe",
    )
    add_model(parser, also=f"; or an exported file ({', '.join(file_suffixes())})")
    parser.add_argument("data", nargs="?", metavar="DIR", help="the same as --data-dir")
    parser.add_argument("--data-dir", help="folder: <split>/<class>/<image>, or <class>/<image>")
    parser.add_argument("--split", help="(default: validation; all images where are no splits)")
    parser.add_argument("--reparam", action="store_true", help="re-parameterize the model first")
    parser.add_argument("-b", "--batch-size", type=positive, default=64, help="(default: 64)")
    parser.add_argument(
        "-j", "--workers", type=natural, default=0, help="processes that load images"
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="fit a logistic regression to embeddings of the training images, and measure it",
    )
    add_size(parser)
    parser.add_argument("--crop-pct", type=share, help="share of the image that is kept")
    parser.add_argument("--device", type=device, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="(default: PyTorch's)")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    parser.add_argument(
        "--output", type=folder, metavar="DIR", help="folder for metrics, tables and a picture"
    )


def _run(args: argparse.Namespace) -> int:
    """Print top-1, top-5 and loss, and the classes with the lowest accuracy."""
    images = args.data_dir or args.data
    if not images:
        raise ConfigError("name the folder of images (--data-dir FOLDER)")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.probe:
        return _probe(args, images)
    load = _exported if is_exported(args) else _module
    model, data_config, classes, num_classes = load(args)
    result = validate(
        model,
        images,
        data_config,
        split=args.split,
        classes=classes,
        num_classes=num_classes,
        batch_size=args.batch_size,
        workers=args.workers,
        skip_bad=args.skip_bad,
        device=args.device,
    )
    written = write_validation(result, args.output) if args.output else []
    files = [f"{args.output} holds {', '.join(path.name for path in written)}"] if written else []
    tell(args, result.as_dict(), result, *files)
    return 0


def _probe(args: argparse.Namespace, images: str) -> int:
    """Print the accuracy of a linear probe."""
    if args.output or args.class_names or args.crop_pct or args.device.type != "cpu":
        raise ConfigError(
            "--probe measures embeddings on the CPU; leave out --output, --class-names, --crop-pct"
            " and --device"
        )
    model = open_model(args)
    set_size(model, args)
    with tqdm(unit="image", leave=False, disable=None) as bar:
        found = probe(
            model,
            images,
            val_split=args.split or "validation",
            skip_bad=args.skip_bad,
            progress=bar.update,
            batch_size=args.batch_size,
            workers=args.workers or None,
            threads=args.threads,
        )
    tell(args, found.as_dict(), found)
    return 0


Loaded = tuple[Callable[[Tensor], Tensor], dict[str, Any], list[str] | None, int | None]


def _module(args: argparse.Namespace) -> Loaded:
    model = open_model(args, **({"deploy": True} if args.reparam else {}))
    set_size(model, args)
    set_input(model, crop_pct=args.crop_pct)
    model.to(args.device)
    return model, resolve_model_data_config(model), label_names(model), model.num_classes  # type: ignore[return-value]


def _exported(args: argparse.Namespace) -> Loaded:
    runner = open_runner(args, "reparam")
    metadata = runner.metadata
    if not metadata.get("input"):
        raise ConfigError(f"{args.model} does not say how images are prepared for it")
    data_config = dict(metadata["input"])
    if args.crop_pct is not None:
        data_config["crop_pct"] = args.crop_pct
    return runner, data_config, metadata.get("classes"), None
