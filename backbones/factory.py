"""The front door: lists models, creates them by name, and loads them from checkpoints."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HFValidationError
from timm.models import PretrainedCfg, load_model_config_from_hf, split_model_name_tag
from timm.utils import natural_key
from torch import nn

from backbones import weights
from backbones.config import Variant, check_arguments, read_family
from backbones.errors import ConfigError, UnknownModelError, WeightsUnavailableError, nearest
from backbones.images import fit_channels
from backbones.manifest import load_manifest
from backbones.registry import PLACEMENT, build, build_with_report, registry, unknown
from backbones.reparameterization import reparameterize
from backbones.schema import constructor_parameters

__all__ = [
    "REMOTE",
    "LoadedModel",
    "create_model",
    "find_variant",
    "is_checkpoint",
    "label_names",
    "list_families",
    "list_models",
    "load_model",
    "open_checkpoint",
]

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
    names.sort(key=natural_key)
    if not pretrained and license is None:
        return names
    by_variant = load_manifest().by_variant
    return [
        entry.name
        for name in names
        for entry in by_variant.get(name, {}).values()
        if entry.available and (license is None or fnmatch.fnmatch(entry.license, license.lower()))
    ]


def find_variant(name: str) -> tuple[Variant | None, str | None]:
    """Split a name into our variant and its tag; (None, tag) where it is none of ours.

    Raises:
        ConfigError: a YAML path that cannot be read.
        UnknownModelError: our variant, but no such tag.
    """
    if (place := _yaml_place(name)) is not None:
        return _user_variant(*place), None
    base, tag = split_model_name_tag(name)
    variant = registry.find(base)
    if variant is not None and tag:
        load_manifest().find(variant.name, tag)
    return variant, tag or None


def label_names(model: nn.Module) -> list[str] | None:
    """Return the names of a model's classes, where its checkpoint or an option said them."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("label_names")


def is_checkpoint(given: str | Path) -> bool:
    """Whether what is given as a model is a checkpoint's path; a tag of a name has a dot, too."""
    path = Path(given)
    if str(given).startswith(REMOTE) or path.suffix in (".yaml", ".yml"):
        return False
    if isinstance(given, Path) or path.suffix in weights.CHECKPOINT_SUFFIXES:
        return True
    return path.is_file() and not timm.is_model(given)


def _yaml_place(name: str) -> tuple[str, str] | None:
    """Split ``path.yaml#variant``; None where `name` is no YAML file. Folders may have a ``#``."""
    splits = [(name, "")] + [(name[:at], name[at + 1 :]) for at, c in enumerate(name) if c == "#"]
    places = [place for place in splits if place[0].endswith((".yaml", ".yml"))]
    there = [place for place in places if Path(place[0]).is_file()]
    return next(iter(there or places), None)


def _user_variant(path: str, chosen: str) -> Variant:
    config = read_family(path, registry.variants)
    model_class = registry.model_class(config.family)
    if not chosen and len(config.variants) == 1:
        chosen = next(iter(config.variants))
    choices = ", ".join(config.variants)
    if not chosen:
        raise ConfigError(f"{path} holds several variants; name one as {path}#NAME ({choices})")
    if chosen not in config.variants:
        raise UnknownModelError(
            f"no variant {chosen!r} in {path}{nearest(chosen, config.variants)} (there: {choices})"
        )
    check_arguments(config.variants[chosen], model_class, hidden=PLACEMENT)
    return config.variants[chosen]


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint_path: str | Path | weights.Checkpoint | None = None,
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
            ``hf-hub:owner/repo@revision``, ``local-dir:path``, or any other model of timm.
        pretrained: load the released weights of the tag.
        checkpoint_path: load a local checkpoint of any known layout; or one that was read.
        num_classes: width of the classifier; None for that of the weights. Where these have
            another, or none, the model has a new classifier with random values.
        in_chans: channels of the input, to which the first convolution of weights is adapted; None
            for those of the checkpoint.
        features_only: return the feature pyramid instead of logits.
        out_indices: which stages' maps; negative values count from the end.
        deploy: return the model re-parameterized (`reparameterize`) and in evaluation mode.
            Checkpoints of the training form are merged on the way; re-parameterized ones need it.
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
    checkpoint = checkpoint_path
    if isinstance(checkpoint, str | Path):
        checkpoint = weights.read_checkpoint(checkpoint)
    if name.startswith(REMOTE):
        return _create_remote(name, pretrained, checkpoint, cache_dir, arguments)
    variant, tag = find_variant(name)
    if checkpoint is not None:
        return _create_from(checkpoint, name, variant, tag, arguments)[0]
    if variant is None:
        return _create_with_timm(name, pretrained, None, cache_dir, arguments)[0]
    return build(variant, pretrained, pretrained_cfg=tag, cache_dir=cache_dir, **arguments)


def _create_from(
    checkpoint: weights.Checkpoint,
    name: str,
    variant: Variant | None,
    tag: str | None,
    arguments: dict[str, Any],
) -> tuple[nn.Module, weights.LoadReport | None, Mapping[str, Any]]:
    """Build the model of a checkpoint; arguments that are not given are the checkpoint's. Return
    it with what was loaded, and what `save_checkpoint` wrote of this very model."""
    described = checkpoint.description
    own_name = variant.name if variant is not None else name
    saved = described if described.get("name") in (name, own_name) else {}
    chosen = "num_classes" in arguments
    if variant is None:
        if timm.is_model(name):
            with torch.device("meta"):
                arguments = weights.sizes_in_file(checkpoint, timm.create_model(name)) | arguments
        made = _create_with_timm(name, False, checkpoint, None, arguments, new_classifier=chosen)
        return *made, saved
    model_class = registry.model_class(variant.family)
    if saved:
        arguments = weights.saved_arguments(checkpoint, model_class) | arguments
    else:
        known = constructor_parameters(model_class)
        given = {key: value for key, value in arguments.items() if key in known}
        twin = model_class(**{**variant.arguments, **given, "device": "meta"})
        arguments = weights.sizes_in_file(checkpoint, twin) | arguments
    made = build_with_report(
        variant, pretrained_cfg=tag, checkpoint=checkpoint, new_classifier=chosen, **arguments
    )
    return *made, saved


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what the checkpoint that it is made of says and how it was loaded."""

    model: nn.Module
    name: str
    variant: Variant | None
    """None for models of timm."""
    tag: str | None
    saved: Mapping[str, Any]
    """What `save_checkpoint` wrote of this very model; empty for files of others."""
    report: weights.LoadReport


def load_model(path: str | Path, name: str | None = None, **overrides: Any) -> nn.Module:
    """Return the model that a checkpoint holds, in evaluation mode.

    A checkpoint that `save_checkpoint` wrote says which model it is: arguments, classes,
    preprocessing and form (re-parameterized or not) are as saved. One of someone else's takes the
    model's name; number of classes and input channels are those of the file.

    Args:
        path: the file, in any layout, wrapper or prefix that `load_checkpoint` takes.
        name: the model, as for `create_model`; None for the one that the file names.
        overrides: further arguments of `create_model`. Another `num_classes` than the file's leaves
            its classifier out.

    Returns:
        The model. ``model.pretrained_cfg`` holds the preprocessing and, as ``label_names``, the
        names of the classes, where the file says them.

    Raises:
        ConfigError: the file does not say which model it is of, and no name is given.
        UnknownModelError: no such model.
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        CheckpointError: the file cannot be read, or does not fit.
    """
    return open_checkpoint(path, name, **overrides).model


def open_checkpoint(
    source: str | Path | weights.Checkpoint,
    name: str | None = None,
    *,
    ours_only: bool = False,
    **overrides: Any,
) -> LoadedModel:
    """As :func:`load_model`, and also return what is known of the checkpoint.

    With `ours_only`, models of timm are unknown.
    """
    checkpoint = weights.read_checkpoint(source) if isinstance(source, str | Path) else source
    described = checkpoint.description
    given = name or described.get("name") or _named_in(checkpoint)
    variant, tag = find_variant(given)
    if variant is None and name is None and described.get("family") in registry.classes:
        # A variant of a user's own file: its arguments are all that is needed.
        variant = Variant(given, described["family"], described.get("arguments") or {})
    if variant is None and ours_only:
        raise UnknownModelError(unknown("model of this package", given, registry.names()))
    as_saved = {"deploy": True} if checkpoint.deploy else {}
    model, report, saved = _create_from(checkpoint, given, variant, tag, as_saved | overrides)
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if cfg is not None:
        cfg.update(saved.get("input") or {})
        if saved.get("classes"):
            cfg["label_names"] = list(saved["classes"])
    assert report is not None
    return LoadedModel(model.eval(), given, variant, tag, saved, report)


def _named_in(checkpoint: weights.Checkpoint) -> str:
    """Return the model's name that a training script wrote into a checkpoint of its own."""
    # What else such a name could be (a path, an address) is not looked at: it is a stranger's.
    for name in checkpoint.model_names:
        if registry.find(split_model_name_tag(name)[0]) is not None or timm.is_model(name):
            return name
    said = f" (only {', '.join(map(repr, checkpoint.model_names))})" * bool(checkpoint.model_names)
    raise ConfigError(
        f"{checkpoint.source} does not say which model it is of{said}; add --name NAME, or in"
        " Python load_model(path, NAME)"
    )


def _create_with_timm(
    name: str,
    pretrained: bool,
    checkpoint: weights.Checkpoint | None,
    cache_dir: str | Path | None,
    arguments: dict[str, Any],
    *,
    new_classifier: bool = False,
) -> tuple[nn.Module, weights.LoadReport | None]:
    if not timm.is_model(name) and not name.startswith(REMOTE):
        choices = [*registry.names(), *timm.list_models()]
        raise UnknownModelError(unknown("model", name, choices))
    deploy = arguments.pop("deploy", False)
    try:
        model = timm.create_model(name, pretrained=pretrained, cache_dir=cache_dir, **arguments)
    except OSError as error:
        raise WeightsUnavailableError(f"{name}: its weights cannot be had: {error}") from error
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if arguments.get("in_chans"):
        cfg.update(fit_channels(cfg, arguments["in_chans"]))
    report = None
    if checkpoint is not None:
        report = weights.load_pretrained(model, checkpoint, new_classifier=new_classifier)
    return (reparameterize(model.eval(), inplace=True) if deploy else model), report


def _create_remote(
    name: str,
    pretrained: bool,
    checkpoint: weights.Checkpoint | None,
    cache_dir: str | Path | None,
    arguments: dict[str, Any],
) -> nn.Module:
    """Build a model described by a config.json; ours where the architecture is ours."""
    scheme, _, place = name.partition(":")
    of_transformers = False
    if scheme == "local-dir":
        content = _local_config(Path(place))
        of_transformers = content.get("model_type") == "timm_wrapper"
        described = dict(content.get("pretrained_cfg") or {})
        described |= {key: content[key] for key in ("num_classes", "label_names") if key in content}
        described |= {"file": place, "source": "local-dir"}
        architecture, saved = content["architecture"], content.get("model_args") or {}
    else:
        try:
            described, architecture, saved = load_model_config_from_hf(place, cache_dir=cache_dir)
        except HFValidationError as error:
            raise ConfigError(f"{name}: write hf-hub:owner/repo@revision; {error}") from None
        except OSError as error:
            raise WeightsUnavailableError(f"{name} cannot be had: {error}") from error
        except (KeyError, AttributeError) as error:
            raise ConfigError(
                f"{name}: its config.json describes no model of timm ({error!r}); if transformers"
                " wrote it, download the repository and use local-dir:FOLDER"
            ) from error
    variant = registry.find(architecture)
    arguments = {**(saved or {}), **arguments}
    known = PretrainedCfg.__dataclass_fields__  # transformers writes fields of its own beside them
    described = {key: value for key, value in described.items() if key in known}
    if variant is not None:
        return build(
            variant,
            pretrained,
            pretrained_cfg=described,
            checkpoint=checkpoint,
            cache_dir=cache_dir,
            **arguments,
        )
    if not timm.is_model(architecture):
        choices = [*registry.names(), *timm.list_models()]
        raise UnknownModelError(f"{name}: {unknown('model', architecture, choices)}")
    if of_transformers:  # whose names timm's own loader does not know
        if pretrained and checkpoint is None:
            checkpoint = weights.read_checkpoint(weights.fetch(PretrainedCfg(file=place)))
        if checkpoint is not None:
            return _create_from(checkpoint, architecture, None, None, arguments)[0]
        name = architecture
    return _create_with_timm(name, pretrained, checkpoint, cache_dir, arguments)[0]


def _local_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a folder that timm, transformers or `save_for_hf` wrote."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file; local-dir: needs a folder with one") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        kind = content.get("model_type") if isinstance(content, dict) else None
        raise ConfigError(
            f"{path}: names no 'architecture', so it describes no model of timm"
            + (f" but transformers' {kind!r}" if kind else "")
            + f"; name the model yourself: load_model({str(folder / 'model.safetensors')!r}, NAME)"
        )
    return content
