"""The bridge to timm: our models in its registry, and its instances of our models as ours."""

import copy
import gc
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm.models
import torch
from timm.models import DefaultCfg
from torch import nn

from backbones.config import Variant, data_folder, read_family
from backbones.errors import EquivalenceError, UnsupportedError
from backbones.manifest import load_manifest
from backbones.registry import build, family_class, pretrained_cfg_of, registry
from backbones.reparameterization import (
    TOLERANCE,
    rebuild_with,
    relative_difference,
    smallest_input,
)
from backbones.skeleton import StagedBackbone

__all__ = ["as_ours", "register_family", "register_shipped_families"]

_logger = logging.getLogger(__name__)
MODULE = "backbones"  # timm keys modules by their last component


def register_family(config_path: str | Path, module: str | Path | None = None) -> list[str]:
    """Register a family, ours or a user's, here and with timm.

    Args:
        config_path: the family's YAML file.
        module: the module (dotted name) or Python file with its one `StagedBackbone` subclass;
            None for ``backbones.families.<family>``.

    Returns:
        The names of its variants.
    """
    config = read_family(config_path, registry.variants)
    registry.add(config, family_class(config, module))
    for variant in config.variants.values():
        _register_with_timm(variant, variant.timm_name or variant.name)
    for alias, target in config.aliases.items():
        _register_with_timm(config.variants[target], alias)
    return list(config.variants)


def register_shipped_families() -> None:
    """Register every family of ``configs/``."""
    # Reading makes many small objects, and one collection over all of torch's costs more than it.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path in sorted((data_folder() / "configs").glob("*.yaml")):
            register_family(path)
    finally:
        if collecting:
            gc.enable()


def _register_with_timm(variant: Variant, name: str) -> None:
    if timm.models.is_model(name):
        _logger.warning(
            "timm has a model %r of its own; ours is reached by backbones.create_model(%r) only."
            " Give it a 'timm_name' in its YAML file.",
            name,
            variant.name,
        )
        return

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(variant, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = MODULE
    source = variant.source
    entry_point.__doc__ = f"{variant.name}: {source.title}, {source.paper}" if source else name
    module = sys.modules[MODULE]
    entries = load_manifest().by_variant.get(variant.name, {})
    cfgs = {tag: pretrained_cfg_of(variant, entry) for tag, entry in entries.items()}
    default = DefaultCfg(is_pretrained=any(entry.available for entry in entries.values()))
    for tag, cfg in (cfgs or {"": pretrained_cfg_of(variant, None)}).items():
        default.tags.append(tag)
        default.cfgs[tag] = cfg
    vars(module).setdefault("default_cfgs", {})[name] = default
    setattr(module, name, entry_point)
    timm.models.register_model(entry_point)
    if name != variant.name:
        registry.timm_names[name] = variant.name


@rebuild_with
def as_ours(model: nn.Module) -> StagedBackbone | None:
    """Rebuild timm's own instance of a model that this package has too, weights included.

    Returns:
        Our model, in the same mode and of the same type; None where `model` is none of these.

    Raises:
        UnsupportedError: the instance was created with arguments that ours does not have.
        EquivalenceError: the two compute different logits.
    """
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or ""
    variant = registry.find(name)
    if variant is None or not type(model).__module__.startswith("timm.models."):
        return None
    first = model.get_parameter(f"{registry.model_class(variant.family).first_conv}.weight")
    arguments: dict[str, Any] = {"in_chans": first.shape[1]}
    head: Any = getattr(model, "head", None)
    pool = getattr(getattr(head, "global_pool", None), "pool_type", None)
    info: Any = getattr(model, "feature_info", None)
    if pool is not None:
        arguments["global_pool"] = pool
    if info and info[-1]["reduction"] < 32:
        arguments["output_stride"] = info[-1]["reduction"]
    classes = getattr(model, "num_classes", 1000)
    ours: Any = build(variant, num_classes=classes, **arguments)
    ours = ours.to(first.device, first.dtype).train(model.training)
    try:
        ours.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise UnsupportedError(
            f"timm's {name} was created with arguments that ours does not have; create it with"
            f" backbones.create_model({variant.name!r}, ...): {error}"
        ) from error
    one: Any = copy.deepcopy(model).cpu().double().eval()
    other = copy.deepcopy(ours).cpu().double().eval()
    x = smallest_input(other, "cpu", torch.float64)
    with torch.no_grad():
        difference = relative_difference(one(x), other(x))
    if not difference <= TOLERANCE:
        raise EquivalenceError(
            f"timm's {name} and ours differ by {difference:.1e} of the largest logit; was it"
            f" changed after it was created? Create it with backbones.create_model({name!r})"
        )
    ours.pretrained_cfg = ours.default_cfg = dict(cfg)
    return ours
