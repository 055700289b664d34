"""Factors on residual branches that keep filled models in the range of trained ones.

Under the plain fill of the golden files every branch is as strong as its identity, and rounding
grows from block to block as it does in no trained model. By family: (pattern, factor) for the
entries of our own layout.
"""

from __future__ import annotations

DAMPING: dict[str, list[tuple[str, float]]] = {
    "spartan": [(r"\.ls\d\.gamma$", 0.2)],
    "unireplknet": [(r"blocks\.\d+\.gamma$", 0.2)],
}
