"""Times of calls, how far they spread, and whether two candidates can be told apart.

Candidates take turns, and the turns of one round lie close together in time: what else happens on
the machine falls on both. Two candidates are therefore compared turn by turn, by the medians of the
turns of a round. The order is *certain* if

* the faster one (by the median of all its calls) wins at least 80 % of the rounds,
* so many wins would come up by chance, were the two alike, in fewer than 5 % of such comparisons
  (the two-sided sign test: 6 of 6, 8 of 9 or 10 of 12 rounds are enough, 5 of 5 are not), and
* where the calls of one of them spread by more than 15 % (interquartile range over median), the
  medians differ by more than that spread.

Otherwise the comparison means nothing, and reports say so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["NOISY", "Times", "certain", "too_noisy"]

NOISY = 0.15
SHARE_OF_ROUNDS = 0.8
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Times:
    """Milliseconds of the timed calls, turn by turn."""

    turns: Sequence[Sequence[float]]

    @cached_property
    def calls(self) -> list[float]:
        """All calls in order."""
        return [ms for turn in self.turns for ms in turn]

    @property
    def median(self) -> float:
        """Milliseconds of the median call."""
        return float(np.median(self.calls))

    @property
    def p90(self) -> float:
        """Milliseconds that nine of ten calls stay below."""
        return float(np.percentile(self.calls, 90))

    @property
    def spread(self) -> float:
        """Interquartile range of the calls over their median."""
        low, high = np.percentile(self.calls, [25, 75])
        return float(high - low) / self.median

    @property
    def turn_medians(self) -> list[float]:
        """The median call of each turn, in milliseconds."""
        return [float(np.median(turn)) for turn in self.turns]


def certain(one: Times, other: Times) -> bool:
    """Whether it is certain which of two candidates is faster; see the module's text."""
    return _doubt(one, other) is None


def too_noisy(name: str, one: Times, other_name: str, other: Times) -> str | None:
    """Return why two candidates cannot be told apart, as a sentence; None where they can."""
    doubt = _doubt(one, other)
    return doubt and f"too noisy to tell {name} from {other_name}: {doubt}"


def _doubt(one: Times, other: Times) -> str | None:
    fast, slow = (one, other) if one.median <= other.median else (other, one)
    pairs = list(zip(fast.turn_medians, slow.turn_medians))
    wins = sum(a < b for a, b in pairs)
    decided = sum(a != b for a, b in pairs)
    if wins < SHARE_OF_ROUNDS * len(pairs) or _sign_test(wins, decided) >= SIGNIFICANCE:
        return f"the faster one won only {wins} of {len(pairs)} rounds"
    spread, difference = max(one.spread, other.spread), slow.median / fast.median - 1
    if spread > NOISY and difference < spread:
        return f"calls spread by {spread:.0%} and the medians differ by {difference:.0%}"
    return None


def _sign_test(wins: int, of: int) -> float:
    """Return the p-value of the two-sided sign test: how often a fair coin is as one-sided."""
    most = max(wins, of - wins)
    tail = sum(math.comb(of, count) for count in range(most, of + 1)) / 2**of
    return min(1.0, 2 * tail)
