"""What a package says of itself: where Xcode looks for it, and all of it as JSON."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from backbones.engines.formats import Conversion

__all__ = ["INPUT", "LABEL", "PROBABILITIES", "describe", "facts_of", "labels_of"]

INPUT = "input"
LABEL, PROBABILITIES = "classLabel", "classLabel_probs"  # Xcode's own names for them
_KEY = "backbones"


def labels_of(conversion: Conversion, count: int) -> list[str] | None:
    """Return distinct labels of the classes, where a package can classify; else None.

    It can where it takes one image and the classes of its logits are known. Core ML keeps
    probabilities by label; of labels that occur twice each gets its class's number.
    """
    classes = conversion.metadata["classes"]
    if not classes or count != 1 or conversion.outputs != ("logits",):
        return None
    occurs = Counter(classes)
    return [
        name if occurs[name] == 1 else f"{name} ({number})" for number, name in enumerate(classes)
    ]


def describe(package: Any, facts: Mapping[str, Any]) -> None:
    """Write facts (JSON values) into a package."""
    name, source = facts["name"] or "model", facts["provenance"] or {}
    kind = "class scores" if list(facts["outputs"]) == ["logits"] else "feature maps"
    package.short_description = f"{name}: images to {kind}"
    if facts["license"]:
        package.license = str(facts["license"])
    if source.get("tag"):
        package.version = str(source["tag"])
    package.user_defined_metadata[_KEY] = json.dumps(facts, allow_nan=False)


def facts_of(description: Any) -> dict[str, Any] | None:
    """Return the facts in a package's description; None if there are none."""
    text = description.metadata.userDefined.get(_KEY)
    return None if text is None else json.loads(text)
