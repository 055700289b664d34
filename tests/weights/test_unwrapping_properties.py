"""Whatever a checkpoint is wrapped in, exactly the values that were put in come out, or nothing.

Random wrappers, averages by decay, prefixes, orders and by-catch, over the toy's layouts and those
of the authors of real families on small shapes.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from golden import FOLDER, Golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from weights_toy import Toy, assert_same, authors, flat, snapshot

from backbones import create_model, load_checkpoint
from backbones.errors import CheckpointError
from backbones.families.convnext.model import ConvNeXt
from backbones.families.cpubone.model import CPUBone
from backbones.families.hornet import HorNet

State = dict[str, Tensor]


class Kind(NamedTuple):
    """A model, and a way to write its state dict as somebody else does."""

    build: Callable[[], nn.Module]
    layout: str
    export: Callable[[State], State]


def renamed(*rules: tuple[str, str]) -> Callable[[State], State]:
    """Write keys as the authors do: each rule replaces the start or an inner part of a name."""

    def export(state: State) -> State:
        result = {}
        for key, value in state.items():
            for ours, theirs in rules:
                if key.startswith(ours) or (ours.startswith(".") and ours in key):
                    key = key.replace(ours, theirs, 1)
            result[key] = value
        return result

    return export


# Our names on the left, on the right those of facebookresearch/ConvNeXt, raoyongming/HorNet and
# altair199797/CPUBone.
PYRAMID = (
    ("stem.", "downsample_layers.0."),
    *((f"stages.{i}.downsample.", f"downsample_layers.{i}.") for i in range(4)),
    *((f"stages.{i}.blocks.", f"stages.{i}.") for i in range(4)),
    (".mlp.fc1.", ".pwconv1."),
    (".mlp.fc2.", ".pwconv2."),
    ("head.norm.", "norm."),
    ("head.fc.", "head."),
)
CONVNEXT = renamed(
    *PYRAMID,
    (".conv_dw.", ".dwconv."),
    (".mlp.grn.weight", ".grn.gamma"),
    (".mlp.grn.bias", ".grn.beta"),
)
HORNET = renamed(
    *PYRAMID,
    (".gnconv.mixer.conv_dw.", ".gnconv.dwconv.dw."),
    (".gnconv.mixer.", ".gnconv.dwconv."),
)
CPUBONE = renamed(
    ("stem.", "backbone.input_stem.op_list."),
    *((f"stages.{i}.", f"backbone.stages.{i}.op_list.") for i in range(4)),
    (".pwise.", ".pwise.0."),
    ("head.in_conv.", "head.op_list.0."),
    ("head.pre_classifier.", "head.op_list.2."),
    ("head.classifier.", "head.op_list.3."),
)
SMALL = {"depths": [1, 1, 1, 1], "num_classes": 3}
MODELS = {
    "toy": Kind(Toy, "backbones", dict),
    "toy, authors'": Kind(Toy, "authors", authors),
    "toy, flat": Kind(Toy, "flat", flat),
    "ConvNeXt V2": Kind(
        lambda: ConvNeXt(dims=[4, 4, 8, 8], use_grn=True, ls_init_value=None, **SMALL),
        "authors",
        CONVNEXT,
    ),
    "HorNet": Kind(
        lambda: HorNet(dims=[16, 16, 16, 32], mixers=["dwconv", "dwconv", "gf", "gf"], **SMALL),
        "authors",
        HORNET,
    ),
    "CPUBone": Kind(
        lambda: CPUBone(dims=[8, 8, 16, 16], head_dims=[8, 8], **SMALL),
        "authors",
        CPUBONE,
    ),
}
GOLDENS = {"ConvNeXt V2": "convnextv2_atto", "HorNet": "hornet_tiny_gf", "CPUBone": "cpubone_b0"}
PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "encoder."]
# From the most preferred down; the one in braces is keyed by decay.
WRAPPERS = ["state_dict_ema", "model_ema", "ema", "state_dict", "{ema}", "model", "module"]
ROADS = ["dict", "zip", "legacy"]


@cache
def model_of(kind: str) -> nn.Module:
    return MODELS[kind].build()


def values_for(model: nn.Module, seed: int) -> State:
    """A state dict of values unlike any other, and unlike those the model has."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.randint(1000, value.shape, generator=generator, dtype=value.dtype)
        for key, value in model.state_dict().items()
    }


def wrapped(content: dict[str, Any], names: list[str], rng: random.Random) -> dict[str, Any]:
    """Put a state dict into wrappers, innermost last, each beside decoys and by-catch."""
    result: dict[str, Any] = dict(content)
    if rng.random() < 0.5:
        result = OrderedDict(result)
        result._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]
    for name in reversed(names):
        by_catch: dict[str, Any] = {
            "epoch": rng.randrange(300),
            "args": argparse.Namespace(lr=0.1, model="x"),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{}]},
            "schedule": Counter({20: 1}),
            "best": None,
            "scaler": {},
        }
        entries = [item for item in by_catch.items() if rng.random() < 0.5]
        entries.append(("ema", {0.9998: result}) if name == "{ema}" else (name, result))
        for decoy in WRAPPERS[WRAPPERS.index(name) + 1 :]:
            if decoy != "{ema}" and rng.random() < 0.3:
                tensors = {k: v + 1 for k, v in content.items() if isinstance(v, Tensor)}
                entries.append((decoy, tensors))
        rng.shuffle(entries)
        result = dict(entries)
    return result


def expected_wrapper(names: list[str]) -> str | None:
    return ".".join("ema[0.9998]" if n == "{ema}" else n for n in names) or None


def carried(content: Any, road: str, folder: Path) -> Any:
    """The checkpoint itself, or a file of it."""
    if road == "dict":
        return content
    path = folder / f"{road}.pth"
    torch.save(content, path, _use_new_zipfile_serialization=road == "zip")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


CHECKPOINTS = {
    "kind": st.sampled_from(sorted(MODELS)),
    "seed": st.integers(0, 1 << 30),
    "prefix": st.lists(st.sampled_from(PREFIXES), max_size=3).map("".join),
    "names": st.lists(st.sampled_from(WRAPPERS), max_size=3),
    "road": st.sampled_from(ROADS),
}
BOUNDED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@BOUNDED
@given(**CHECKPOINTS, counters=st.booleans(), notes=st.booleans())
def test_what_was_put_in_comes_out(
    folder: Path,
    kind: str,
    seed: int,
    prefix: str,
    names: list[str],
    road: str,
    counters: bool,
    notes: bool,
) -> None:
    model, rng = model_of(kind), random.Random(seed)
    before, state = snapshot(model), values_for(model, seed)
    if not counters:
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    entries = [(prefix + k, v) for k, v in MODELS[kind].export(state).items()]
    if notes:
        entries.append(("note", "not a tensor"))
    rng.shuffle(entries)
    report = load_checkpoint(model, carried(wrapped(dict(entries), names, rng), road, folder))
    assert_same(model, {**before, **state})
    assert (report.layout, report.prefix) == (MODELS[kind].layout, prefix)
    assert report.wrapper == expected_wrapper(names)
    assert report.loaded == len(state)
    assert not (report.missing or report.unexpected or report.dropped)


def spoil(state: State, key: str, how: str) -> State:
    """A state dict with one entry that is not as it should be."""
    spoiled = dict(state)
    value = spoiled.pop(key)
    if how == "renamed":
        spoiled[f"{key}_"] = value
    elif how == "longer":
        spoiled[key] = torch.cat([value, value[:1]])
    elif how == "flat":
        spoiled[key] = torch.cat([value.flatten(), value.flatten()[:1]])
    elif how == "whole numbers":
        spoiled[key] = value.long()
    elif how == "not a number":
        spoiled[key] = value.clone()
        spoiled[key].view(-1)[-1] = float("nan")
    return spoiled


@BOUNDED
@given(
    **CHECKPOINTS,
    how=st.sampled_from(["removed", "renamed", "longer", "flat", "whole numbers", "not a number"]),
    place=st.integers(0, 1 << 30),
)
def test_one_wrong_entry_spoils_all(
    folder: Path,
    kind: str,
    seed: int,
    prefix: str,
    names: list[str],
    road: str,
    how: str,
    place: int,
) -> None:
    model, rng = model_of(kind), random.Random(seed)
    before = snapshot(model)
    state = MODELS[kind].export(values_for(model, seed))
    keys = [key for key, value in state.items() if value.is_floating_point()]
    spoiled = spoil(state, keys[place % len(keys)], how)
    entries = [(prefix + key, value) for key, value in spoiled.items()]
    rng.shuffle(entries)
    with pytest.raises(CheckpointError):
        load_checkpoint(model, carried(wrapped(dict(entries), names, rng), road, folder))
    assert_same(model, before)


@pytest.mark.parametrize("kind", GOLDENS)
def test_the_authors_names_are_theirs(kind: str) -> None:
    """The names used above, held against a state dict of the authors' own code."""
    name = GOLDENS[kind]
    golden = Golden(FOLDER / f"{name}.json.gz")
    model: Any = create_model(name, device="meta")
    theirs = {
        key for key in golden.content["state_dict"] if not key.endswith("num_batches_tracked")
    }
    ours = MODELS[kind].export(model.state_dict())
    assert {key for key in ours if not key.endswith("num_batches_tracked")} == theirs
