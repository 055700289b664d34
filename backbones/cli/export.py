"""``backbones export``."""

import argparse
from pathlib import Path
from typing import Any

import backbones
from backbones.cli.opening import (
    add_model,
    add_size,
    asked_size,
    open_model,
    refuse_same,
)
from backbones.cli.parsing import command, positive, tell
from backbones.engines import (
    AGREEMENT,
    COREML_TARGETS,
    INPUT_LAYOUTS,
    CoreMlConfig,
    ExecuTorchConfig,
    FormatConfig,
    LiteRtConfig,
    OnnxConfig,
    WebConfig,
    available_formats,
    file_suffixes,
)
from backbones.errors import ConfigError
from backbones.factory import is_checkpoint, label_names

__all__ = ["add_parser"]

DIMENSIONS = ("batch", "height", "width")


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "export",
        _run,
        "write a model as a file for deployment, compared with the model",
        "backbones export quickstart-output/model.safetensors model.onnx",
        "backbones export lsnet_t lsnet_t.xml --precision int8 --calibration photos",
        "backbones export cpubone_s app.onnx --preprocess --dynamic batch",
        "backbones export lsnet_t lsnet_t.mlpackage --preprocess",
        "backbones export quickstart-output/model.safetensors page --format web",
        "backbones export lsnet_t page --format web --precision int8 --calibration photos",
    )
    add_model(parser)
    parser.add_argument(
        "output",
        metavar="OUT",
        help=f"file to write ({', '.join(file_suffixes())}), or folder for --format web",
    )
    parser.add_argument(
        "--format", choices=available_formats(), help="(default: the file's suffix decides)"
    )
    add_size(parser)
    parser.add_argument(
        "--dynamic",
        nargs="*",
        default=["batch"],
        metavar="DIM",
        accepts=DIMENSIONS.__contains__,
        help=f"sizes that stay free: {', '.join(DIMENSIONS)} (default: batch)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="fix the number of images, for compilers that want static shapes",
    )
    onnx = parser.add_argument_group("ONNX files")
    onnx.add_argument("--opset", type=positive, help="(default: the exporter's own)")
    onnx.add_argument("--input-name", metavar="NAME", help="(default: input)")
    onnx.add_argument(
        "--output-names",
        type=lambda text: text.split(","),
        metavar="NAME[,NAME...]",
        help="(default: logits, or features_0,features_1,...)",
    )
    parser.add_argument(
        "--input-layout",
        choices=INPUT_LAYOUTS,
        help="order of a LiteRT file's input (default: nhwc, as programs for phones have images)",
    )
    parser.add_argument(
        "--max-size",
        type=positive,
        metavar="N",
        help="largest free height and width of an ExecuTorch file (default: twice the input size)",
    )
    parser.add_argument(
        "--minimum-target",
        choices=COREML_TARGETS,
        help="first system that a Core ML file is for (default: iOS16, which is macOS13)",
    )
    parser.add_argument(
        "--web-runtime",
        metavar="DIR",
        help="ONNX Runtime Web's files, for --format web (default: fetch them by npm)",
    )
    parser.add_argument(
        "--precision",
        help="fp32, fp16, bf16 or int8, as far as the format has it (default: fp32; Core ML: fp16)",
    )
    parser.add_argument(
        "--calibration", metavar="DIR", help="images for int8, and for figures on real images"
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=AGREEMENT,
        metavar="SHARE",
        help="of images whose class int8 shall keep; the worst layers stay in float32 for it, none"
        " at 0 (default: %(default)s)",
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
        help="take fresh weights, to try out a device before weights are there",
    )


def _format(args: argparse.Namespace) -> str | FormatConfig | None:
    """Return the format asked for, with its options."""
    names = ("opset", "input_name", "output_names")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.web_runtime is not None:
        if args.format != "web":
            raise ConfigError("--web-runtime is for --format web; leave it out, or add that")
        return WebConfig(args.web_runtime)
    if args.input_layout is not None:
        if not _is_for(args, "litert", ".tflite"):
            raise ConfigError(
                "--input-layout: LiteRT files alone have it; leave it out, or write OUT.tflite"
            )
        return LiteRtConfig(args.input_layout)
    if args.max_size is not None:
        if not _is_for(args, "executorch", ".pte"):
            raise ConfigError(
                "--max-size: ExecuTorch files alone have it; leave it out, or write OUT.pte"
            )
        return ExecuTorchConfig(max_size=args.max_size)
    if args.minimum_target is not None:
        if not _is_for(args, "coreml", ".mlpackage"):
            raise ConfigError(
                "--minimum-target: Core ML files alone have it; leave it out, or write"
                " OUT.mlpackage"
            )
        return CoreMlConfig(args.minimum_target)
    if not given:
        return args.format
    if not _is_for(args, "onnx", ".onnx"):
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{flags}: ONNX files alone have it; leave it out, or write OUT.onnx")
    return OnnxConfig(**given)


def _is_for(args: argparse.Namespace, format: str, suffix: str) -> bool:
    """Tell whether a format was asked for, by its name or else by the suffix of the file."""
    return args.format == format or (args.format is None and Path(args.output).suffix == suffix)


def _run(args: argparse.Namespace) -> int:
    """Write the file and print how well it agrees with the model."""
    size = asked_size(args)
    refuse_same(args.model, args.output)
    from_file = is_checkpoint(args.model)
    if from_file and args.random:
        raise ConfigError(f"--random is for a name, and {args.model} holds weights; leave it out")
    fresh = {"pretrained": False, "num_classes": args.num_classes} if args.random else {}
    model = open_model(args, **fresh)
    report = backbones.export(
        model,
        args.output,
        format=_format(args),
        input_size=size,
        dynamic=args.dynamic,
        batch_size=args.batch,
        precision=args.precision,
        merge=not args.no_merge,
        preprocess=args.preprocess,
        features=args.features,
        calibration=args.calibration,
        agreement=args.agreement,
        classes=label_names(model),
        provenance={"checkpoint": Path(args.model).name} if from_file else None,
    )
    tell(args, report.as_dict(), report)
    return 0
