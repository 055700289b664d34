"""``backbones export``."""

import argparse
import json
from pathlib import Path
from typing import Any

import backbones
from backbones.cli.parsing import command, json_flag, label_names, open_model, positive
from backbones.engines import available_formats, file_suffixes
from backbones.errors import ConfigError
from backbones.weights import CHECKPOINT_SUFFIXES

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command(
        commands,
        "export",
        "write a model as a file for deployment, compared with the model",
        "backbones export quickstart-output/model.safetensors model.onnx\n"
        "         backbones export lsnet_t lsnet_t.xml --precision int8 --calibration photos\n"
        "         backbones export cpubone_s app.onnx --preprocess --dynamic batch",
    )
    parser.add_argument("model", metavar="NAME|CHECKPOINT", help="a model's name, or weights")
    parser.add_argument(
        "output", metavar="OUT", help=f"file to write ({', '.join(file_suffixes())})"
    )
    parser.add_argument("--model", dest="name", help="name of a checkpoint that does not say it")
    parser.add_argument(
        "--format", choices=available_formats(), help="(default: the file's suffix decides)"
    )
    parser.add_argument(
        "--img-size", type=positive, nargs="+", metavar="N", help="height and width in pixels"
    )
    parser.add_argument(
        "--dynamic",
        nargs="*",
        default=["batch"],
        metavar="DIM",
        help="sizes that stay free: batch, height, width (default: batch)",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        help="fp32, fp16, bf16 or int8, as far as the format has it (default: fp32)",
    )
    parser.add_argument(
        "--calibration", metavar="DIR", help="images for int8, and for figures on real images"
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="take decoded images, uint8 (B, H, W, C), and resize and normalize them in the file",
    )
    parser.add_argument(
        "--features", action="store_true", help="give the maps of all stages instead of logits"
    )
    parser.add_argument("--no-merge", action="store_true", help="keep the training form")
    parser.add_argument(
        "--random",
        action="store_true",
        help="export NAME with fresh weights, to try out a device before weights are there",
    )
    json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the file and print how well it agrees with the model."""
    if args.img_size and len(args.img_size) > 2:
        raise ConfigError(f"--img-size takes one or two numbers, got {len(args.img_size)}")
    is_file = Path(args.model).suffix in CHECKPOINT_SUFFIXES  # a tag has a dot as well
    if is_file:
        model = open_model(args.name, args.model)
    elif args.random:
        model = backbones.create_model(args.model).eval()
    else:
        model = open_model(args.model, None)
    size = None
    if args.img_size:
        channels = getattr(model, "in_chans", None) or 3
        size = (channels, args.img_size[0], args.img_size[-1])
    report = backbones.export(
        model,
        args.output,
        format=args.format,
        input_size=size,
        dynamic=args.dynamic,
        precision=args.precision,
        merge=not args.no_merge,
        preprocess=args.preprocess,
        features=args.features,
        calibration=args.calibration,
        classes=label_names(model),
        provenance={"checkpoint": Path(args.model).name} if is_file else None,
    )
    print(json.dumps(report.as_dict()) if args.json else report)
    return 0
