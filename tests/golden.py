"""Reads golden files: what the authors' own code computes on deterministic weights and inputs."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "goldens"
TOLERANCE = 1e-9


def fill(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the deterministic float64 values of an entry, by the rule of fill version 1."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    if key.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        values = 0.1 * rng.standard_normal(shape)
    elif len(shape) <= 1 and key != "input":
        if key.endswith(("bias", "beta")):
            values = 0.1 * rng.standard_normal(shape)
        else:
            values = rng.uniform(0.5, 1.5, shape)
    elif key == "input":
        values = rng.standard_normal(shape)
    else:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32).astype(np.float64))


def variant_of(name: str) -> str:
    """Return the variant of a golden file's name, without its suffixes."""
    return re.split(r"@|__timm|_deploy|_reparam|_tame", name.removesuffix(".json.gz"))[0]


class Golden:
    """One golden file."""

    def __init__(self, path: Path) -> None:
        self.name = path.name.removesuffix(".json.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            self.content: dict[str, Any] = json.load(file)

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["content"][key]
        except KeyError:
            raise AttributeError(key) from None

    @property
    def variant(self) -> str:
        """The variant's name, without the file's suffixes."""
        return variant_of(self.name)

    def input_shape(self) -> tuple[int, ...]:
        value = self.content["input"]
        return tuple(value["shape"] if isinstance(value, dict) else value)

    def input_tensor(self) -> Tensor:
        return fill("input", self.input_shape())

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the filled state dict in the file's own layout."""
        tensors: dict[str, Tensor] = {}
        for key, entry in self.content["state_dict"].items():
            if "value" in entry:
                tensors[key] = torch.tensor(entry["value"]).reshape(tuple(entry["shape"]))
            else:
                tensors[key] = fill(key, tuple(entry["shape"]))
        for pattern, factor in self.content.get("fill_scale") or ():
            for key in tensors:
                if re.search(pattern, key):
                    tensors[key] = tensors[key] * factor
        for key, source in (self.content.get("tied") or {}).items():
            tensors[key] = tensors[source].clone()
        return tensors

    def stages(self) -> list[dict[str, Any]]:
        return [f for f in self.content["features"] if f["name"].startswith("stage.")]


def assert_logits(actual: Tensor, golden: Golden, key: str = "logits") -> None:
    expected = torch.tensor(golden.content[key], dtype=torch.float64)
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"{golden.name}: {key} differ by {error:.2e} of the largest"


def assert_feature(actual: Tensor, expected: dict[str, Any], name: str) -> None:
    assert list(actual.shape) == list(expected["shape"]), name
    flat = actual.detach().flatten()
    index = np.linspace(0, flat.numel() - 1, 16).astype(np.int64)
    samples = torch.tensor(expected["samples"], dtype=torch.float64)
    error = (flat[index] - samples).abs().max() / flat.abs().max()
    assert error < TOLERANCE, f"{name}: samples differ by {error:.2e}"
    mean_error = abs(flat.mean().item() - expected["mean"]) / expected["std"]
    assert mean_error < TOLERANCE, f"{name}: mean differs by {mean_error:.2e} std"
    std_error = abs(flat.std(unbiased=False).item() / expected["std"] - 1)
    assert std_error < TOLERANCE, f"{name}: std differs by {std_error:.2e}"
