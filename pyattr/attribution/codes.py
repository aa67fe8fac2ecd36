"""Codes of training items: which members of an ensemble see an item.

Bit i of an item's code is 1 where member i is trained on it. Codes are NumPy uint64, so that an ensemble has at most 64
members.

Source: Dai, Gifford, "Training Data Attribution for Diffusion Models", arXiv 2306.02174.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops._arguments import check_integer
from ..reference.philox import philox4x32_10

MAX_MEMBERS = 64
MAX_ITEMS = 2**63 - 1
_CODES = 0x636F6465  # key word 1 of the draws
_BLOCK = 1 << 16  # counters, or codes, that are worked on at a time
_PAIRS = 1 << 22  # pairs of codes compared at a time


def random_codes(num_items: int, num_members: int, *, weight: int | None = None, seed: int = 0) -> np.ndarray:
    """Distinct codes, uniform among those of one weight.

    Codes are numbered 0 to C(n, h) - 1 in rising order. Where N <= C(n, h) / 2, numbers are drawn one after the other and
    repeats dropped; else all are put into a random order, and the first N taken. Either way each sequence of N distinct codes
    is equally likely.

    Args:
        num_items: N, at most C(n, h).
        num_members: n, in [2, 64].
        weight: h, in [1, n - 1]: how many members see an item; n div 2 if None.
        seed: in [0, 2^32).

    Returns:
        [N] uint64; a function of the arguments alone.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: about 40 N bytes.

    Source: Dai, Gifford 2023, section 3; the draws are Philox4x32-10.
    """
    op = "random_codes"
    _check_members(op, num_members)
    weight = num_members // 2 if weight is None else check_integer(op, "weight", weight, 1, num_members - 1)
    seed = check_integer(op, "seed", seed, 0, 2**32 - 1)
    total = math.comb(num_members, weight)
    num_items = check_integer(op, "num_items", num_items, 0, MAX_ITEMS)
    if num_items > total:
        raise ValueError(f"{op}: num_items must be at most C({num_members}, {weight}) = {total}, got {num_items}")
    stream = seed, num_members, weight
    if 2 * num_items > total:
        # Two equal keys, once in 2^64 / total^2 times, come in the order of their numbers.
        numbers = np.argsort(_words(stream, 0, total), kind="stable")[:num_items].astype(np.uint64)
    else:
        numbers = _distinct(stream, num_items, total)
    codes = np.empty(num_items, np.uint64)
    for start in range(0, num_items, _BLOCK):
        codes[start : start + _BLOCK] = _unrank(numbers[start : start + _BLOCK], num_members, weight)
    return codes


def _distinct(stream: tuple[int, int, int], count: int, total: int) -> np.ndarray:
    """The first ``count`` distinct numbers of a sequence that is uniform in [0, total)."""
    drawn = np.empty(0, np.uint64)
    words, wanted = 0, count
    while True:
        more = 16 + int(wanted * (1 + count / total))  # on average enough where count <= total / 2
        found = _words(stream, words, more)
        words += more
        limit = 2**64 // total * total  # above it, numbers modulo the total would not be equally likely
        found = found if limit == 2**64 else found[found < np.uint64(limit)]
        drawn = np.concatenate([drawn, found % np.uint64(total)])
        _, first = np.unique(drawn, return_index=True)
        drawn = drawn[np.sort(first)]
        if len(drawn) >= count:
            return drawn[:count]
        wanted = count - len(drawn)


def _words(stream: tuple[int, int, int], first: int, count: int) -> np.ndarray:
    """Random 64-bit numbers ``first`` to ``first + count - 1`` of a stream, [count] uint64."""
    seed, num_members, weight = stream
    out = np.empty(count, np.uint64)
    for start in range(first, first + count, _BLOCK):
        stop = min(start + _BLOCK, first + count)
        calls = torch.arange(start // 2, -(-stop // 2))
        w = [
            x.numpy().astype(np.uint64)
            for x in philox4x32_10((calls & 0xFFFFFFFF, calls >> 32, num_members, weight), (seed, _CODES))
        ]
        pairs = np.stack([w[0] | w[1] << np.uint64(32), w[2] | w[3] << np.uint64(32)], 1).ravel()
        out[start - first : stop - first] = pairs[start % 2 :][: stop - start]
    return out


def _unrank(numbers: np.ndarray, num_members: int, weight: int) -> np.ndarray:
    """The codes of ``weight`` ones with these numbers in rising order, [N] uint64."""
    # choose[p, k]: codes of k ones below bit p; those with bit p come after them.
    choose = np.array([[math.comb(p, k) for k in range(weight + 1)] for p in range(num_members)], np.uint64)
    codes, rest = np.zeros(len(numbers), np.uint64), numbers.copy()
    ones = np.full(len(numbers), weight)
    for position in range(num_members - 1, -1, -1):
        below = choose[position, ones]
        has = (rest >= below) & (ones > 0)
        codes |= has.astype(np.uint64) << np.uint64(position)
        rest -= np.where(has, below, np.uint64(0))
        ones -= has
    return codes


def walsh_codes(labels, num_members: int = 7) -> np.ndarray:
    """One code for each class: the rows of a Sylvester matrix, of which any two share as many members.

    The first row and column of the Sylvester matrix of order n + 1 are dropped and -1 becomes 0. Row i goes to the i-th
    distinct label in rising order, column j to member j. Each code has (n - 1) / 2 ones, two codes (n - 3) / 4 in common.

    Args:
        labels: [N] integers.
        num_members: n; n + 1 is a power of two, and at most n labels are distinct.

    Returns:
        [N] uint64.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Dai, Gifford 2023, section 5.1: with n = 7 the digits 0, 1, 2, 3, 4, 6, 8 have the codes 0101010, 1001100, 0011001,
    1110000, 0100101, 1000011, 0010110, member 0 first.
    """
    labels = _integers("walsh_codes", "labels", labels)
    _check_members("walsh_codes", num_members)
    if num_members + 1 & num_members:
        raise ValueError(f"walsh_codes: num_members + 1 must be a power of two, got num_members {num_members}")
    distinct, row = np.unique(labels, return_inverse=True)
    if len(distinct) > num_members:
        raise ValueError(
            f"walsh_codes: labels must have at most {num_members} distinct values, one for each row, got {len(distinct)}"
        )
    order = np.arange(1, num_members + 1, dtype=np.uint64)
    # Entry (i, j) of a Sylvester matrix is 1 where i and j have an even number of ones in common.
    bits = (ones((order[:, None] & order).ravel()) % 2 == 0).reshape(num_members, -1).astype(np.uint64)  # [n, n]
    return (bits << np.arange(num_members, dtype=np.uint64)).sum(1, dtype=np.uint64)[row.ravel()]


def group_codes(groups, num_members: int, *, weight: int | None = None, seed: int = 0) -> np.ndarray:
    """A code for each group of items ("super samples"), which are then ablated together.

    Args:
        groups: [N] integers; the i-th distinct one in rising order takes code i of :func:`random_codes`.
        num_members, weight, seed: see there.

    Returns:
        [N] uint64.

    Raises:
        TypeError, ValueError: an argument is not as above, or there are more groups than codes.
    """
    distinct, group = np.unique(_integers("group_codes", "groups", groups), return_inverse=True)
    return random_codes(len(distinct), num_members, weight=weight, seed=seed)[group.ravel()]


def as_codes(codes, num_members: int, op: str) -> np.ndarray:
    """Check codes.

    Args:
        codes: [N] integers of any library; signed ones as their bits where n = 64.
        num_members: n.
        op: for the error message.

    Returns:
        [N] uint64.

    Raises:
        TypeError, ValueError: they are no integers, have bits beyond n, or an item that every member saw, without which none is
            left; the message names it.
    """
    _check_members(op, num_members)
    codes = _integers(op, "codes", codes)
    if codes.dtype != np.uint64:
        if num_members < 64 and len(codes) and codes.min() < 0:
            raise ValueError(f"{op}: codes must not be negative, got {codes.min()}")
        codes = codes.astype(np.uint64)
    for bad, what in (
        (codes > _all(num_members), f"have bits below {num_members} alone"),
        (codes == _all(num_members), "leave at least one member out"),
    ):
        if bad.any():
            item = int(bad.argmax())
            raise ValueError(f"{op}: codes must {what}, got {codes[item]:#x} for item {item}")
    return np.ascontiguousarray(codes)


def membership(codes, num_members: int) -> np.ndarray:
    """Which members saw which items, [N, n] bool.

    Args:
        codes: [N], see :func:`as_codes`.
        num_members: n.
    """
    return _bits(as_codes(codes, num_members, "membership"), num_members)


def ones(codes: np.ndarray) -> np.ndarray:
    """How many members saw an item: the weights h, [N] int64 for [N] uint64."""
    counts = np.empty(len(codes), np.int64)
    for start in range(0, len(codes), _BLOCK):
        block = np.ascontiguousarray(codes[start : start + _BLOCK])
        counts[start : start + _BLOCK] = np.unpackbits(block.view(np.uint8)).reshape(-1, 64).sum(1)
    return counts


def ablation_weights(codes, num_members: int) -> np.ndarray:
    """The weights ``u_{-x}`` of the members when an item is taken away: equal on those that did not see it, 0 on the others.

    Args:
        codes: [M], see :func:`as_codes`.
        num_members: n.

    Returns:
        [M, n] float64, ``(1 - c) / (n - h)``.
    """
    unseen = ~_bits(as_codes(codes, num_members, "ablation_weights"), num_members)
    return unseen / unseen.sum(1, keepdims=True)


def guarantee(codes, num_members: int) -> bool:
    """Whether every item is still in a member's training set when all members that saw another item are removed.

    So that it fails for a pair of distinct items exactly where the code of one has no bit outside the other's. Codes that are
    distinct and of one weight never fail; items that share a code are one item here, being ablated together.

    Args:
        codes: [N], see :func:`as_codes`.
        num_members: n.

    Extra memory: about 100 MB where weights differ; the time is then quadratic in the number of distinct codes.

    Source: Dai, Gifford 2023, theorem 1.
    """
    codes = np.unique(as_codes(codes, num_members, "guarantee"))
    weights = ones(codes)
    if len(codes) <= 1:
        return True
    if weights.min() == 0:
        return False
    if weights.min() == weights.max():
        return True
    codes = codes[np.argsort(weights, kind="stable")]
    rows = max(1, _PAIRS // len(codes))
    for start in range(0, len(codes), rows):
        small = codes[start : start + rows, None]  # [r, 1]
        larger = codes[None, start + 1 :]
        contained = (small & ~larger) == 0  # [r, L]
        contained &= small != larger
        if contained.any():
            return False
    return True


class Bound(NamedTuple):
    """An upper bound of theorem 1.

    Attributes:
        value: the bound.
        trivial: what holds without it: 1 for a probability, 2 C for the difference of two functions bounded by C.
        applies: whether its precondition C(n, h) >= 2 N, n = 2 h holds.
    """

    value: float
    trivial: float
    applies: bool

    @property
    def vacuous(self) -> bool:
        """Whether it says nothing that is not known without it."""
        return not self.applies or self.value >= self.trivial


def collision_bound(num_items: int, num_members: int, *, weight: int | None = None) -> Bound:
    """That independent uniform codes are not all distinct: probability at most ``ln 4 (N - 1)^2 / C(n, h)``.

    Args:
        num_items: N, at least 1.
        num_members: n, in [2, 64].
        weight: h; n div 2 if None.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Dai, Gifford 2023, proof of theorem 1.
    """
    total, applies = _precondition("collision_bound", num_items, num_members, weight)
    return Bound(math.log(4) * (num_items - 1) ** 2 / total, 1.0, applies)


def bias_bound(
    num_items: int, num_members: int, *, weight: int | None = None, sup: float = 1.0, ablated: bool = False
) -> Bound:
    """How far the expected output of an ensemble lies from that of independently drawn splits.

    ``||E[f_hat - f]||_inf <= ln 16 (N - 1)^2 C / C(n, h)``, and with an item ablated ``ln 16 N^2 C / C(n, h)``.

    For all data sets of the paper it is vacuous: at N = 10,000 and n = 16 it is 21,500 C where the trivial bound is 2 C, and
    its precondition C(n, h) >= 2 N fails; for CIFAR-10 (60,000, n = 20) and CelebA (202,599, n = 24) it is 54,000 C and
    42,100 C.

    Args:
        num_items: N, at least 1.
        num_members: n, in [2, 64].
        weight: h; n div 2 if None.
        sup: C, a bound on the members' outputs; finite, not negative.
        ablated: the ensemble without the members that saw one item.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Dai, Gifford 2023, theorem 1.
    """
    total, applies = _precondition("bias_bound", num_items, num_members, weight)
    if not 0 <= sup < math.inf:
        raise ValueError(f"bias_bound: sup must be a finite number, not negative, got {sup}")
    pairs = num_items**2 if ablated else (num_items - 1) ** 2
    return Bound(math.log(16) * pairs * sup / total, 2 * sup, applies)


def _precondition(op: str, num_items: int, num_members: int, weight: int | None) -> tuple[int, bool]:
    _check_members(op, num_members)
    weight = num_members // 2 if weight is None else check_integer(op, "weight", weight, 1, num_members - 1)
    num_items = check_integer(op, "num_items", num_items, 1, MAX_ITEMS)
    total = math.comb(num_members, weight)
    return total, num_members == 2 * weight and total >= 2 * num_items


def _check_members(op: str, num_members: int) -> None:
    check_integer(op, "num_members", num_members, 2, MAX_MEMBERS)


def _all(num_members: int) -> np.uint64:
    return np.uint64(2**num_members - 1)


def _bits(codes: np.ndarray, num_members: int) -> np.ndarray:  # [N] -> [N, n] bool
    return (codes[:, None] >> np.arange(num_members, dtype=np.uint64) & np.uint64(1)).astype(bool)


def _integers(op: str, argument: str, values) -> np.ndarray:
    values = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"{op}: {argument} must have shape [N], got {list(values.shape)}")
    if values.dtype.kind not in "iu" and values.size:
        raise TypeError(f"{op}: {argument} must be integers, got {values.dtype}")
    return values.astype(np.int64) if values.dtype.kind not in "iu" else values
