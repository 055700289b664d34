"""Families and variants by name, and the one road that builds them."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg
from torch import nn

from backbones import weights
from backbones.config import FamilyConfig, Variant, check_arguments
from backbones.errors import ConfigError, UnknownModelError, nearest
from backbones.images import fit_channels
from backbones.manifest import WeightsEntry, load_manifest
from backbones.reparameterization import reparameterize
from backbones.skeleton import StagedBackbone

__all__ = [
    "PLACEMENT",
    "Registry",
    "build",
    "build_with_report",
    "family_class",
    "pretrained_cfg_of",
    "registry",
    "unknown",
]

PLACEMENT = ("device", "dtype")
SOURCES = ("file", "state_dict", "url", "hf_hub_id")


@dataclass
class Registry:
    """What is registered: classes by family, variants and aliases by name."""

    classes: dict[str, type[StagedBackbone]] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    timm_names: dict[str, str] = field(default_factory=dict)  # timm's name -> variant

    def names(self) -> list[str]:
        """Return every name that `find` resolves."""
        return [*self.variants, *self.aliases]

    def find(self, name: str) -> Variant | None:
        """Return the variant of a name, an alias or the name timm knows it by; None if unknown."""
        name = self.aliases.get(name, name)
        return self.variants.get(name) or self.variants.get(self.timm_names.get(name, ""))

    def model_class(self, family: str) -> type[StagedBackbone]:
        """Return the class of a family.

        Raises:
            UnknownModelError: the family is not registered.
        """
        if family not in self.classes:
            raise UnknownModelError(unknown("family", family, self.classes))
        return self.classes[family]

    def add(self, config: FamilyConfig, model_class: type[StagedBackbone]) -> None:
        """Register a family.

        Raises:
            ConfigError: a name is taken by another family.
        """
        for name in (*config.variants, *config.aliases):
            other = self.find(name)
            if other is not None and other.family != config.family:
                raise ConfigError(
                    f"{config.path}: {name!r} is registered by family {other.family!r} already"
                )
        self.classes[config.family] = model_class
        self.variants.update(config.variants)
        self.aliases.update(config.aliases)


registry = Registry()


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return "no <kind> 'x'; did you mean ...?" with up to three near names."""
    return f"no {kind} {name!r}{nearest(name, choices, 3)}"


def build(variant: Variant, pretrained: bool = False, **options: Any) -> nn.Module:
    """Build a variant: the one road to a model; for the arguments see `build_with_report`."""
    return build_with_report(variant, pretrained, **options)[0]


def build_with_report(
    variant: Variant,
    pretrained: bool = False,
    *,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    checkpoint: str | Path | weights.Checkpoint | None = None,
    cache_dir: str | Path | None = None,
    deploy: bool = False,
    new_classifier: bool | None = None,
    **overrides: Any,
) -> tuple[nn.Module, weights.LoadReport | None]:
    """Build a variant and load weights into it.

    Args:
        variant: what to build.
        pretrained: load the weights of the tag (or of `pretrained_cfg`).
        pretrained_cfg: a tag, or timm's description of other weights.
        pretrained_cfg_overlay: timm's way to override single fields of that description.
        checkpoint: load this local file instead of downloading; a path, or as it was read.
        cache_dir: where downloads are kept.
        deploy: re-parameterize the model, which is then in evaluation mode.
        new_classifier: whether the weights may have another classifier, or none; None for yes if
            `overrides` have ``num_classes``.
        overrides: further arguments of the constructor, ``features_only`` and ``out_indices``.

    Returns:
        The model, and what was loaded; None where nothing was, or timm loaded it.

    Raises:
        ConfigError: the variant's arguments do not fit the family.
        TypeError: an unknown override.
        WeightsUnavailableError, CheckpointError: the weights cannot be had or do not fit.
    """
    model_class = registry.model_class(variant.family)
    check_arguments(variant, model_class, hidden=PLACEMENT)
    overlay = {key: value for key, value in (pretrained_cfg_overlay or {}).items() if value}
    cfg, entry = _resolve_cfg(variant, pretrained_cfg, overlay)
    by_timm = pretrained and checkpoint is None and any(key in overlay for key in SOURCES)
    if pretrained and checkpoint is None and not by_timm and entry is not None:
        weights.check_obtainable(entry, cache_dir)
    model = build_model_with_cfg(
        model_class,
        variant.timm_name or variant.name,
        by_timm,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=weights.filter_for_timm,
        feature_cfg={"out_indices": range(len(model_class.strides)), "feature_cls": "getter"},
        cache_dir=cache_dir,
        **{**variant.arguments, **overrides},
    )
    # timm's list and dict extractors take the model apart; the others hold it whole.
    for body in model.modules():
        if isinstance(body, StagedBackbone):
            cfg_of_body: Any = body.pretrained_cfg
            cfg_of_body |= fit_channels(cfg_of_body, body.in_chans)
            body.config = {
                "name": variant.name,
                "family": variant.family,
                "arguments": body.arguments,
            }
    report = None
    if checkpoint is not None or (pretrained and not by_timm):
        # A tag that was asked for says of a local file too which parts it lacks.
        is_release = checkpoint is None or isinstance(pretrained_cfg, str)
        report = weights.load_pretrained(
            model,
            checkpoint if checkpoint is not None else entry or cfg,
            lacks=entry.lacks if entry is not None and is_release else (),
            new_classifier="num_classes" in overrides if new_classifier is None else new_classifier,
            deploy=deploy,
            cache_dir=cache_dir,
        )
    return (reparameterize(model.eval(), inplace=True) if deploy else model), report


def _resolve_cfg(
    variant: Variant,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None,
    overlay: Mapping[str, Any],
) -> tuple[PretrainedCfg, WeightsEntry | None]:
    if isinstance(pretrained_cfg, Mapping):
        return PretrainedCfg(**pretrained_cfg), None
    if isinstance(pretrained_cfg, PretrainedCfg):
        tag = pretrained_cfg.tag
        entry = load_manifest().by_variant.get(variant.name, {}).get(tag or "")
        return pretrained_cfg, entry
    entry = load_manifest().find(variant.name, pretrained_cfg)
    return pretrained_cfg_of(variant, entry), entry


def pretrained_cfg_of(variant: Variant, entry: WeightsEntry | None) -> PretrainedCfg:
    """Return timm's description of a tag, or of an untrained variant for None."""
    model_class = registry.model_class(variant.family)
    names = model_class.classifiers(variant.arguments)
    common: dict[str, Any] = {
        "architecture": variant.timm_name or variant.name,
        "first_conv": model_class.first_conv,
        "classifier": names[0] if len(names) == 1 else names,
    }
    if variant.source is not None:
        common |= {"paper_name": variant.source.title, "origin_url": variant.source.repository}
    if entry is None:
        return PretrainedCfg(**common, pool_size=_pool_size(model_class, (3, 224, 224)))
    source: dict[str, Any] = {}
    if entry.available and entry.repo:
        revision = f"@{entry.revision}" if entry.revision else ""
        source = {"hf_hub_id": entry.repo + revision, "hf_hub_filename": entry.file}
    elif entry.available:
        source = {"url": entry.url}
    test_size = entry.test_input_size
    return PretrainedCfg(
        **source,
        **common,
        tag=entry.tag,
        input_size=tuple(entry.input_size),  # type: ignore[arg-type]
        test_input_size=tuple(test_size) if test_size else None,  # type: ignore[arg-type]
        pool_size=_pool_size(model_class, entry.input_size),
        test_pool_size=_pool_size(model_class, test_size) if test_size else None,
        interpolation=entry.interpolation,
        crop_pct=entry.crop_pct,
        test_crop_pct=entry.test_crop_pct,
        crop_mode=entry.crop_mode,
        mean=tuple(entry.mean),
        std=tuple(entry.std),
        num_classes=1000 if entry.num_classes is None else entry.num_classes,
        license=entry.license,
    )


def _pool_size(model_class: type[StagedBackbone], input_size: Iterable[int]) -> tuple[int, int]:
    """Return height and width of the last feature map."""
    _, height, width = input_size
    stride = math.prod(model_class.strides)
    return math.ceil(height / stride), math.ceil(width / stride)


def family_class(config: FamilyConfig, module: str | Path | None) -> type[StagedBackbone]:
    """Import a family, of ours for None or a dotted name or Python file, and return its class.

    Raises:
        ConfigError: there is no such module, or it has not one subclass of `StagedBackbone`.
    """
    if isinstance(module, Path):
        spec = importlib.util.spec_from_file_location(f"backbones_family_{config.family}", module)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{module}: not a Python file")
        loaded: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
    else:
        name = module or f"backbones.families.{config.family}"
        try:
            loaded = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ConfigError(f"{config.path}: family {config.family!r} has no {name}") from None
    found = [
        value
        for value in vars(loaded).values()
        if isinstance(value, type)
        and issubclass(value, StagedBackbone)
        and f"{value.__module__}.".startswith(f"{loaded.__name__}.")
    ]
    if len(found) != 1:
        names = [cls.__name__ for cls in found]
        raise ConfigError(f"{loaded.__file__}: expected one StagedBackbone subclass, found {names}")
    return found[0]
