"""The model card, ``README.md``, of a published model."""

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from backbones.weights.publish.config_json import is_own_name
from backbones.weights.target import Target

__all__ = ["model_card"]

# Identifiers that the Hub takes as a license; any other is refused unless it is called "other".
HUB_LICENSES = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause"
    " bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0"
    " cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0"
    " cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0"
    " cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 eupl-1.1"
    " eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl ncsa odbl"
    " ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib unknown".split()
)
UNSTATED = "unstated"


def model_card(
    model: nn.Module,
    config: Mapping[str, Any],
    *,
    repo_id: str | None,
    license: str,
    provenance: Mapping[str, Any] | None,
) -> str:
    """Return a card that says what is known of a model with this ``config.json``, and no more.

    The example names `repo_id`, or a placeholder for None; the front matter has the license of the
    weights as the Hub spells it.
    """
    target = Target(model)
    cfg = config["pretrained_cfg"]
    backbone = config["num_classes"] == 0
    task = "image-feature-extraction" if backbone else "image-classification"
    known, other = _license(license)
    front = ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "backbones"],
        license=known,
        license_name=other,
    )
    size = " x ".join(str(n) for n in cfg["input_size"])
    dtype = next(iter(target.module.parameters())).dtype
    facts = {
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}, stored as {dtype}",
        "Input": f"{size} (channels x height x width), mean {list(cfg['mean'])}, standard deviation"
        f" {list(cfg['std'])}, {cfg['interpolation']} interpolation, crop {cfg['crop_pct']}",
        "Output": "features; there is no classifier"
        if backbone
        else f"{config['num_classes']} classes"
        + (", named in config.json" if config.get("label_names") else ""),
        "Architecture": " ".join(filter(None, (cfg.get("paper_name"), cfg.get("origin_url")))),
        "License of the weights": license,
    }
    lines = [f"- **{key}:** {value}" for key, value in facts.items() if value]
    origin = (
        _indented(json.dumps(dict(provenance), indent=2, ensure_ascii=False))
        if provenance
        else "Nothing was recorded of the training or the origin of these weights."
    )
    return "\n\n".join(
        [
            f"---\n{front.to_yaml().strip()}\n---",
            f"# {target.name}",
            "\n".join(lines),
            "## Use",
            *_usage(target, str(config["architecture"]), f"hf-hub:{repo_id or 'OWNER/NAME'}"),
            "## Origin",
            origin,
            "The accuracy was not measured when this card was written.\n",
        ]
    )


def _license(license: str) -> tuple[str, str | None]:
    """Return the Hub's identifier and, where it has none, the license's own name."""
    if license == UNSTATED:
        return "unknown", None
    known = license.lower()
    return (known, None) if known in HUB_LICENSES else ("other", license)


def _usage(target: Target, architecture: str, name: str) -> list[str]:
    deploy = ", deploy=True" if target.deployed else ""
    call = f'create_model("{name}", pretrained=True{deploy})'
    needed = (
        "timm knows the architecture once `backbones` is imported."
        if is_own_name(architecture)
        else "timm has a class of its own for these weights, so that `backbones` need not be there."
    )
    if target.deployed:
        needed += (
            " The weights are in deploy form: norms and branches are merged into their neighbors,"
            " which takes `deploy=True` to load and cannot be undone for training."
        )
    if architecture.removeprefix("backbones_") != target.name:
        needed += (
            f" The architecture is a variant of one's own; config.json describes it as"
            f" `{architecture}` with other arguments."
        )
    return [
        _indented(f"import backbones\n\nmodel = backbones.{call}"),
        "or by timm:",
        _indented(f"import backbones\nimport timm\n\nmodel = timm.{call}")
        if is_own_name(architecture)
        else _indented(f"import timm\n\nmodel = timm.{call}"),
        needed,
    ]


def _indented(text: str) -> str:
    """Return a block of code that no text inside of it can end."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
