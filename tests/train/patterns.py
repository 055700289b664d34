"""Images that a small model learns in a few steps."""

import numpy as np
from PIL import Image

CLASSES = ["north", "east", "south", "west"]
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


def write_patterns(root, counts=(("train", 12), ("val", 4)), classes=CLASSES):
    """Write images whose class is the bright quarter, ``root/<split>/<class>/<number>.png``."""
    rng = np.random.default_rng(0)
    for split, count in counts:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                row, column = divmod(label % 4, 2)
                pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 150
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root


def short_run(images, output):
    """Return what makes a short run; tests add what they are about."""
    return {
        "data_dir": str(images),
        "model": "convnext_atto",
        "model_kwargs": SMALL,
        "pretrained": False,
        "recipe": "none",
        "img_size": 32,
        "crop_pct": 1.0,
        "batch_size": 16,
        "channels_last": False,
        "epochs": 2,
        "lr": 6e-3,
        "hflip": 0.0,
        "scale": (0.9, 1.0),
        "ratio": (1.0, 1.0),
        "output": str(output),
        "experiment": "run",
    }
