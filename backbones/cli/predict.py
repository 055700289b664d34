"""``backbones predict``."""

import argparse
import json
from typing import Any

import torch
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from tqdm import tqdm

from backbones.cli.parsing import command, json_flag, label_names, open_model, positive
from backbones.train import DataError, open_image

__all__ = ["add_parser", "run"]

DEFAULT_MODEL = "convnext_tiny"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command(
        commands,
        "predict",
        "name what is on images",
        "backbones predict cat.jpg dog.jpg --model convnext_tiny --top-k 3\n"
        "         backbones predict digit.png --checkpoint quickstart-output/model.safetensors",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--model",
        help="model name; its pretrained weights are downloaded unless --checkpoint is given"
        f" (default: the checkpoint's, else {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--checkpoint", help="weights to use; files saved by this package say which model they are"
    )
    parser.add_argument(
        "--top-k", type=positive, default=5, help="classes to print an image (default: 5)"
    )
    json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the likeliest classes of each image; bad images are named before anything is run."""
    _check_images(args.images)
    name = args.model or (None if args.checkpoint else DEFAULT_MODEL)
    model = open_model(name, args.checkpoint)
    classes = label_names(model)
    if classes is None and (subset := infer_imagenet_subset(model)):
        classes = ImageNetInfo(subset).label_descriptions()
    transform = create_transform(**resolve_model_data_config(model))
    mode = "L" if getattr(model, "in_chans", 3) == 1 else "RGB"
    rows = []
    for path in tqdm(args.images, unit="image", leave=False, disable=None):
        with torch.inference_mode():
            scores = model(transform(open_image(path, mode))[None])[0].softmax(dim=0)
        top = scores.topk(min(args.top_k, len(scores)))
        found = [
            {"class": classes[i] if classes else f"class {i}", "index": i, "probability": p}
            for p, i in zip(top.values.tolist(), top.indices.tolist())
        ]
        rows.append({"image": path, "predictions": found})
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(row["image"])
        for guess in row["predictions"]:
            print(f"  {guess['probability']:7.2%}  {guess['class']}")
    return 0


def _check_images(paths: list[str]) -> None:
    """Decode every image once."""
    problems = []
    for path in paths:
        try:
            open_image(path)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n       ".join(problems))
