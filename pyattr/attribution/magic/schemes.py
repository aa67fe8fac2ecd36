"""Which states of a training to keep, so that its steps can be reversed with few of them and little recomputation.

A scheme divides the steps [lo, hi) that follow a kept state: the states at the inner boundaries are made from it and kept, then
the parts are reversed from the last to the first, each divided in its turn until it is a single step.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

SCHEMES = ("all", "sqrt", "tree", "binomial")


class Part(NamedTuple):
    """Steps [lo, hi) to be reversed; ``level`` is what the scheme knows of them."""

    lo: int
    hi: int
    level: int


@dataclass(frozen=True)
class Scheme:
    """One of the ways below, for T steps.

    ==========  ==========================================  ====================================  =============================
    name        divides                                     states at a time                      steps of training, in all
    ==========  ==========================================  ====================================  =============================
    all         into single steps                           T                                     T
    sqrt        every ceil(sqrt(T)) steps, then into ones   2 sqrt(T)                             below 2 T
    tree        into k equal parts, again and again         (k - 1) log_k T + 1                   below (1 + log_k T) T
    binomial    so that S states are used best              S                                     least possible with S
    ==========  ==========================================  ====================================  =============================

    One more state, the last that was made, is held beside these.

    Args:
        name: one of these.
        steps: T.
        branching: k of "tree", at least 2.
        slots: S of "binomial", at least 1.

    Source: Griewank, Walther, "Algorithm 799: revolve", ACM TOMS 26, 2000, for "binomial"; Engstrom et al., "Optimizing ML
    Training with Metagradient Descent", 2025, for "tree" (REPLAY).
    """

    name: str
    steps: int
    branching: int = 8
    slots: int = 1

    def whole(self) -> Part:
        """All steps."""
        return Part(0, self.steps, self.slots if self.name == "binomial" else 0)

    def divide(self, part: Part) -> tuple[list[int], list[Part]]:
        """The states to keep within a part of more than one step, and the parts it falls into, in order."""
        lo, hi, level = part
        if self.name == "binomial":
            if level == 1:  # no state to spare: the last step, made from lo, then the rest
                return [], [Part(lo, hi - 1, 1), Part(hi - 1, hi, 1)]
            middle = lo + binomial_split(hi - lo, level)
            return [middle], [Part(lo, middle, level), Part(middle, hi, level - 1)]
        if self.name == "all" or (self.name == "sqrt" and level == 1):
            points = list(range(lo + 1, hi))
        elif self.name == "sqrt":
            stride = math.isqrt(hi - lo - 1) + 1
            points = list(range(lo + stride, hi, stride))
        else:
            points = sorted({lo + number * (hi - lo) // self.branching for number in range(1, self.branching)} - {lo})
        bounds = [lo, *points, hi]
        return points, [Part(a, b, level + 1) for a, b in itertools.pairwise(bounds)]

    @functools.cached_property
    def laid(self) -> frozenset[int]:
        """The states that training itself keeps: those that are there when the reversal begins."""
        found, part = {0}, self.whole()
        while part.hi - part.lo > 1:
            points, parts = self.divide(part)
            found.update(points)
            part = parts[-1]
        return frozenset(found)

    @property
    def lasting(self) -> frozenset[int]:
        """Those of them that no other state takes the place of, so that a second reversal finds them."""
        return self.laid if self.name == "all" else frozenset(self._top()) if self.name == "sqrt" else frozenset({0})

    def _top(self) -> list[int]:
        return [0, *self.divide(self.whole())[0]] if self.steps > 1 else [0]


def binomial_split(length: int, slots: int) -> int:
    """Where to keep the second of S states over ``length`` steps, so that the fewest steps are made again.

    With beta(s, r) = (s + r choose s) and r the least for which length <= beta(S, r), a first part is best if it is of between
    beta(S, r - 2) and beta(S, r - 1) steps, and leaves between beta(S - 1, r - 1) and beta(S - 1, r). The longest is taken.
    """
    repeats = 0
    while math.comb(slots + repeats, slots) < length:
        repeats += 1
    most = math.comb(slots + repeats - 1, slots)
    return min(most, length - math.comb(slots + repeats - 2, slots - 1), length - 1)


def choose(steps: int, state_bytes: int, memory: int, name: str = "auto", branching: int = 8) -> Scheme:
    """The scheme of a name; for "auto" the one that makes the fewest steps with the states that fit into ``memory``.

    Raises:
        ValueError: an argument is not as above, or not one state fits.
    """
    if name not in ("auto", *SCHEMES):
        raise ValueError(f"MAGIC: checkpointing must be one of auto, {', '.join(SCHEMES)}, got {name!r}")
    if branching < 2:
        raise ValueError(f"MAGIC: branching must be at least 2, got {branching}")
    slots = memory // max(state_bytes, 1)
    if name in ("auto", "binomial") and slots < 2:
        raise ValueError(f"MAGIC: memory must hold at least two states of {state_bytes} bytes each, got {memory} bytes")
    if name == "auto":
        name = "all" if slots > steps else "binomial"
    # The last state that was made takes the place of one.
    return Scheme(name, steps, branching, min(slots - 1, steps) if name == "binomial" else 1)
