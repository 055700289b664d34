"""The prefixes that wrappers of a model leave on its parameters' names."""

from collections.abc import Iterable

from torch import Tensor

__all__ = ["PREFIXES", "prefixes", "strip"]

_WHOLE = ("module.", "_orig_mod.", "model.")
# These name one part of a larger model: what lies outside of them is not ours.
_PART = ("backbone.", "encoder.")
PREFIXES = (*_WHOLE, *_PART)
_MAX_PREFIXES = 3
_MAX_CHAINS = 8  # each costs a look at every key in every layout


def prefixes(tensors: Iterable[str]) -> list[str]:
    """Return the chains of known prefixes that occur in the keys, the shortest ones, in order."""
    found = {""}
    for key in tensors:
        chain = ""
        for _ in range(_MAX_PREFIXES):
            step = next((p for p in PREFIXES if key.startswith(p, len(chain))), None)
            if step is None:
                break
            chain += step
            found.add(chain)
    return sorted(found, key=lambda chain: (len(chain), chain))[:_MAX_CHAINS]


def strip(
    tensors: dict[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor] | None, tuple[str, ...]]:
    """Take `prefix` off; return the tensors and the keys outside of the part it names.

    None stands for the tensors where two entries would get the same name.
    """
    names_part = any(part in prefix for part in _PART)
    stripped: dict[str, Tensor] = {}
    outside: list[str] = []
    for key, tensor in tensors.items():
        if names_part and not key.startswith(prefix):
            outside.append(key)
            continue
        new = key.removeprefix(prefix)
        if new in stripped:
            return None, ()
        stripped[new] = tensor
    return stripped, tuple(outside)
