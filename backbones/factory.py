"""The front door: lists, describes and creates models by name."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import load_model_config_from_hf, split_model_name_tag
from torch import nn

from backbones import foreign, info, weights
from backbones.config import Variant, read_family
from backbones.errors import ConfigError, UnknownModelError, nearest
from backbones.info import ModelInfo
from backbones.manifest import load_manifest
from backbones.registry import build, registry, unknown

__all__ = ["create_model", "find_variant", "list_families", "list_models", "model_info"]

REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")


def list_families() -> list[str]:
    """Return the registered families."""
    return sorted(registry.classes)


def list_models(
    filter: str | Sequence[str] = "*",
    *,
    family: str | None = None,
    pretrained: bool = False,
    license: str | None = None,
) -> list[str]:
    """Return the names of our models, in natural order.

    Args:
        filter: shell-style pattern or patterns of the variant's name.
        family: only this family.
        pretrained: names with tag of the weights that can be downloaded, instead of variants.
        license: likewise, only weights under a license that matches this pattern (``"mit"``).

    Raises:
        UnknownModelError: the family does not exist.
    """
    if family is not None:
        registry.model_class(family)
    patterns = [filter] if isinstance(filter, str) else list(filter)
    names = [
        name
        for name, variant in registry.variants.items()
        if (family is None or variant.family == family)
        and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    names.sort(key=_natural)
    if not pretrained and license is None:
        return names
    by_variant = load_manifest().by_variant
    return [
        entry.name
        for name in names
        for entry in by_variant.get(name, {}).values()
        if entry.available and (license is None or fnmatch.fnmatch(entry.license, license.lower()))
    ]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def model_info(name: str) -> ModelInfo:
    """Return what is known of a model of ours, by name, alias, name with tag or YAML path.

    Raises:
        UnknownModelError: no such model or tag.
    """
    variant, tag = find_variant(name)
    if variant is None:
        raise UnknownModelError(unknown("model", name, registry.names()))
    return info.describe(variant, tag)


def find_variant(name: str) -> tuple[Variant | None, str | None]:
    """Split a name into our variant and its tag; (None, tag) where it is none of ours.

    Raises:
        ConfigError: a YAML path that cannot be read.
        UnknownModelError: our variant, but no such tag.
    """
    path, _, chosen = name.partition("#")
    if path.endswith((".yaml", ".yml")):
        return _user_variant(path, chosen), None
    base, tag = split_model_name_tag(name)
    variant = registry.find(base)
    if variant is not None and tag:
        load_manifest().find(variant.name, tag)
    return variant, tag or None


def _user_variant(path: str, chosen: str) -> Variant:
    config = read_family(path, registry.variants)
    registry.model_class(config.family)
    if not chosen and len(config.variants) == 1:
        return next(iter(config.variants.values()))
    choices = ", ".join(config.variants)
    if not chosen:
        raise ConfigError(f"{path} holds several variants; name one as {path}#NAME ({choices})")
    if chosen not in config.variants:
        raise UnknownModelError(
            f"no variant {chosen!r} in {path}{nearest(chosen, config.variants)} (there: {choices})"
        )
    return config.variants[chosen]


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    deploy: bool = False,
    cache_dir: str | Path | None = None,
    **overrides: Any,
) -> nn.Module:
    """Create a model.

    Args:
        name: a variant (``convnext_tiny``), with a tag (``convnext_tiny.fb_in1k``), an alias, a
            YAML file of one's own (``./mine.yaml``, ``./mine.yaml#variant``),
            ``hf-hub:owner/repo@revision``, ``local-dir:path``, or any other model of timm. A
            family (``spartan``) stands for whatever variant the file `checkpoint_path` holds, in
            families whose arguments follow from a checkpoint's shapes.
        pretrained: load the released weights of the tag.
        checkpoint_path: load a local checkpoint of any known layout.
        num_classes: width of the classifier; None for that of the weights.
        in_chans: channels of the input; the first convolution of pretrained weights is adapted.
        features_only: return the feature pyramid instead of logits.
        out_indices: which stages' maps; negative values count from the end.
        deploy: return the model in deploy form (`reparameterize`) and evaluation mode. Checkpoints
            of the training form are merged on the way; files saved in deploy form need it.
        cache_dir: where downloads are kept.
        overrides: further constructor arguments, such as ``drop_path_rate=0.1``.

    Raises:
        UnknownModelError: no such model or tag; the message names the nearest.
        ConfigError: a YAML file is wrong.
        WeightsUnavailableError: the weights cannot be had; the message says where they are.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    given = {"num_classes": num_classes, "in_chans": in_chans, "out_indices": out_indices}
    arguments = {**overrides, **{key: value for key, value in given.items() if value is not None}}
    if features_only:
        arguments["features_only"] = True
    if deploy:
        arguments["deploy"] = True
    if name.startswith(REMOTE):
        return _create_remote(name, pretrained, checkpoint_path, cache_dir, arguments)
    variant, tag = find_variant(name)
    family = split_model_name_tag(name)[0]
    if variant is None and family in registry.classes:
        if pretrained and checkpoint_path is None and (entry := load_manifest().find(family, tag)):
            checkpoint_path = weights.fetch(entry, cache_dir=cache_dir)
        variant, pretrained = _variant_of_checkpoint(family, checkpoint_path), False
    if variant is None:
        return _create_with_timm(name, pretrained, checkpoint_path, cache_dir, arguments)
    if checkpoint_path is not None:
        model_class = registry.model_class(variant.family)
        saved = weights.saved_arguments(checkpoint_path, variant.name, model_class)
        arguments = {**saved, **arguments}
    return build(
        variant,
        pretrained,
        pretrained_cfg=tag,
        checkpoint_path=checkpoint_path,
        cache_dir=cache_dir,
        **arguments,
    )


def _variant_of_checkpoint(family: str, path: str | Path | None) -> Variant:
    """Return a variant whose arguments are read off a checkpoint."""
    if path is None:
        first = list_models(family=family)[0]
        raise ConfigError(
            f"{family!r} is a family; name a variant, such as {first!r}, or pass"
            " checkpoint_path=... for a family that can tell its arguments from a checkpoint"
        )
    model_class = registry.model_class(family)
    arguments = weights.saved_arguments(path, family, model_class)
    return Variant(family, family, arguments or weights.inferred_arguments(path, model_class))


def _create_with_timm(
    name: str,
    pretrained: bool,
    checkpoint_path: str | Path | None,
    cache_dir: str | Path | None,
    arguments: dict[str, Any],
) -> nn.Module:
    if not timm.is_model(name) and not name.startswith(REMOTE):
        choices = [*registry.names(), *timm.list_models()]
        raise UnknownModelError(unknown("model", name, choices))
    deploy = arguments.pop("deploy", False)
    model = timm.create_model(name, pretrained=pretrained, cache_dir=cache_dir, **arguments)
    if checkpoint_path is not None:
        weights.load_checkpoint(model, checkpoint_path)
    return foreign.reparameterize(model.eval(), inplace=True) if deploy else model


def _create_remote(
    name: str,
    pretrained: bool,
    checkpoint_path: str | Path | None,
    cache_dir: str | Path | None,
    arguments: dict[str, Any],
) -> nn.Module:
    """Build a model described by a config.json; ours where the architecture is ours."""
    scheme, _, place = name.partition(":")
    if scheme == "local-dir":
        path = Path(place) / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; local-dir: needs a folder with one") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from None
        described = dict(content.get("pretrained_cfg") or {})
        described |= {"file": place, "source": "local-dir"}
        architecture, saved = content.get("architecture"), content.get("model_args") or {}
    else:
        described, architecture, saved = load_model_config_from_hf(place, cache_dir=cache_dir)
        saved = saved or {}
    variant = registry.find(architecture or "")
    if variant is None:
        return _create_with_timm(name, pretrained, checkpoint_path, cache_dir, arguments)
    return build(
        variant,
        pretrained,
        pretrained_cfg=described,
        checkpoint_path=checkpoint_path,
        cache_dir=cache_dir,
        **{**saved, **arguments},
    )
