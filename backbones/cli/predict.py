"""``backbones predict``."""

import argparse
from typing import Any

import torch
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from tqdm import tqdm

from backbones.cli.opening import add_model, add_size, label_names, open_model, set_size
from backbones.cli.parsing import command, positive, tell
from backbones.errors import DataError
from backbones.images import find_bad_images, image_mode, open_image

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "predict",
        _run,
        "name what is on images",
        "backbones predict convnext_tiny cat.jpg dog.jpg --top-k 3",
        "backbones predict quickstart-output/model.safetensors digit.png",
    )
    add_model(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--top-k", type=positive, default=5, help="classes to print an image (default: 5)"
    )
    add_size(parser)


def _run(args: argparse.Namespace) -> int:
    """Print the likeliest classes of each image; bad images are named before anything is run."""
    if bad := find_bad_images(args.images):
        raise DataError("\n       ".join(bad.values()))
    model = open_model(args)
    set_size(model, args)
    classes = label_names(model)
    if classes is None and (subset := infer_imagenet_subset(model)):
        classes = ImageNetInfo(subset).label_descriptions()
    transform = create_transform(**resolve_model_data_config(model))
    mode = image_mode(getattr(model, "in_chans", None) or 3)
    rows, lines = [], []
    for path in tqdm(args.images, unit="image", leave=False, disable=None):
        with torch.inference_mode():
            scores = model(transform(open_image(path, mode))[None])[0].softmax(dim=0)
        top = scores.topk(min(args.top_k, len(scores)))
        found = [
            {"class": classes[i] if classes else f"class {i}", "index": i, "probability": p}
            for p, i in zip(top.values.tolist(), top.indices.tolist())
        ]
        rows.append({"image": path, "predictions": found})
        lines += [path, *(f"  {guess['probability']:7.2%}  {guess['class']}" for guess in found)]
    tell(args, rows, *lines)
    return 0
