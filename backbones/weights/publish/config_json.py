"""The ``config.json`` of a published model: what timm's loader, and ours, rebuild it from."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import filter_pretrained_cfg, is_model_in_modules
from torch import nn

from backbones.config import data_folder, read_family
from backbones.errors import UnsupportedError
from backbones.reparameterization import reparameterize
from backbones.schema import constructor_parameters
from backbones.skeleton import StagedBackbone
from backbones.weights.saving import input_config
from backbones.weights.target import Target, inner_module

__all__ = ["check_rebuilt", "hub_config", "is_own_name"]

_MODULES = ["backbones"]  # where timm's registry keeps the models of this package
# Arguments that mean the same to every classification model of timm.
_COMMON = {"num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate"}
# The tag is of the weights that the model was created from.
_LEFT_OUT = ("architecture", "tag", "state_dict", "custom_load", "label_offset")


def hub_config(
    model: nn.Module, *, license: str, classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Describe a model as timm's ``config.json`` does.

    Where timm itself has a model of the variant's name, which takes the same weights, that is the
    architecture, and the result loads without this package. A variant that is registered nowhere
    (a user's YAML file) is described as another one of its family with all arguments that differ.

    Raises:
        UnsupportedError: the model was not made by `create_model`, or JSON cannot hold an argument.
    """
    body = inner_module(model)
    if (
        not isinstance(body, StagedBackbone)
        or not body.config
        or not hasattr(body, "pretrained_cfg")
    ):
        raise UnsupportedError(
            f"{type(body).__name__} was not made by backbones.create_model from a variant of this"
            " package, so no config.json can name it; for others there is timm.models.save_for_hf"
        )
    cfg: Mapping[str, Any] = body.pretrained_cfg  # type: ignore[assignment]
    architecture, base = _base(body, str(cfg.get("architecture")))
    arguments = _arguments(body, base)
    variant = body.config["name"]
    if not body.deployed and arguments.keys() <= _COMMON and architecture == f"backbones_{variant}":
        architecture = variant
    known = {key: value for key, value in cfg.items() if key not in _LEFT_OUT}
    described = filter_pretrained_cfg(known, remove_source=True)
    described |= input_config(body) | {"license": license, "fixed_input_size": False}
    if classes is not None or cfg.get("num_classes") != body.num_classes:
        described.pop("label_names", None)
        described.pop("label_descriptions", None)
    stride = body.feature_info[-1]["reduction"]
    described["pool_size"] = [math.ceil(n / stride) for n in described["input_size"][1:]]
    names = body.classifier_names
    described["classifier"] = names[0] if len(names) == 1 else list(names)
    return {
        "architecture": architecture,
        "num_classes": body.num_classes,
        "num_features": body.num_features,
        **({"label_names": list(classes)} if classes is not None else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": described,
    }


def is_own_name(architecture: str) -> bool:
    """Whether timm knows an architecture only once this package is imported."""
    return is_model_in_modules(architecture, _MODULES)


def check_rebuilt(model: nn.Module, folder: Path) -> None:
    """Refuse a ``config.json`` of which timm makes a model that does not take `model`'s weights."""
    body: Any = inner_module(model)
    with torch.device("meta"):
        twin: Any = timm.create_model(f"local-dir:{folder}")
    if body.deployed:
        reparameterize(twin.eval(), inplace=True, verify=False)
    own, other = body.state_dict(), twin.state_dict()
    target = Target(body)
    wrong = sorted(own.keys() ^ other.keys()) + [
        key
        for key in own.keys() & other.keys()
        if own[key].shape != other[key].shape and not target.is_resizable(key)
    ]
    if wrong:
        raise UnsupportedError(
            f"{target.name} cannot be rebuilt from its name and arguments, {wrong[:4]} differ: was"
            " it pruned or changed after it was created? Publish a whole model, as create_model"
            " makes it"
        )


def _base(body: StagedBackbone, architecture: str) -> tuple[str, StagedBackbone]:
    """Return the name of a registered variant, the model's own if it has one, and that variant."""
    assert body.config is not None
    family, name = body.config["family"], body.config["name"]
    for candidate in (architecture, f"backbones_{name}"):
        if is_own_name(candidate):
            twin = timm.create_model(candidate, device="meta")
            if type(twin) is type(body):
                return candidate, twin
    path = data_folder() / "configs" / f"{family}.yaml"
    if not path.is_file():
        raise UnsupportedError(
            f"{name!r} is not registered, nor is its family {family!r} one of this package: who"
            " loads the model could not build it; register it with backbones.register_family"
        )
    first = next(iter(read_family(path).variants.values()))
    architecture = first.timm_name or first.name
    return architecture, timm.create_model(architecture, device="meta")


def _arguments(body: StagedBackbone, base: StagedBackbone) -> dict[str, Any]:
    """Return the arguments in which two models of a family differ, as plain JSON values."""
    mine, others = _all_arguments(body), _all_arguments(base)
    differing = {}
    for key, value in mine.items():
        try:
            plain = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UnsupportedError(
                f"argument {key}={value!r} cannot be written to config.json ({error}); create the"
                " model with plain numbers, texts and lists"
            ) from error
        if plain != json.loads(json.dumps(others[key])):
            differing[key] = plain
    return differing


def _all_arguments(model: StagedBackbone) -> dict[str, Any]:
    """Return every argument a model was created with, those left at their defaults included."""
    parameters = constructor_parameters(type(model))
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    for name in ("device", "dtype"):
        defaults.pop(name, None)
    return defaults | model.arguments
