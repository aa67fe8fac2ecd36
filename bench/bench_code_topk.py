"""code_topk of one query beside torch, which expands the bits of some codes at a time and multiplies, in codes per second.

Codes have weight n / 2 and are in memory, 10^8 of them; time grows with their number, and goals are stated for 10^9. Torch is
timed on fewer. Answers are compared before: indices of ours with float64 values over the codes that torch takes.
"""

import functools

import pytest
import torch

from bench import memory
from bench.contenders import Here
from bench.figures import Goal, lead
from pyattr import ops, testing

TABLE = "code_topk"
CODES, THEIRS, PIECE, K = 100_000_000, 1_000_000, 1 << 14, 10
MEMBERS = {"n=24": 24, "n=40": 40, "n=64": 64}
SECONDS = {"n=24": 1.5, "n=40": 2.5, "n=64": 4.5}  # for 1e9 codes
EXPANDED = "torch, bits expanded and multiplied"
OURS = [f"pyattr {name}" for name in testing.usable_backends("code_topk") if name != "reference"]


def _times_torch(column, wanted):
    return Goal(TABLE, f"{column}: at least {wanted} times torch", lead("pyattr cpu", EXPANDED, column), wanted)


def _codes_per_second(column, seconds):
    return Goal(
        TABLE, f"{column}: 1e9 codes in at most {seconds} s", lambda rate: rate("pyattr cpu", column), 1e9 / seconds
    )


GOALS = [goal for column in MEMBERS for goal in (_codes_per_second(column, SECONDS[column]), _times_torch(column, 15))]


@functools.cache
def gram(n: int) -> torch.Tensor:
    """Of a Jacobian whose members differ by a tenth of what they have in common; float64."""
    generator = torch.Generator().manual_seed(n)
    own = torch.randn(3072, n, generator=generator, dtype=torch.float64)
    common = 10 * torch.randn(3072, 1, generator=generator, dtype=torch.float64)
    return (own + common).T @ (own + common)


@functools.lru_cache(maxsize=1)
def codes(n: int, count: int) -> torch.Tensor:
    """[count] int64, uniform of weight n / 2: a million drawn, the rest by rotating and flipping their bits."""
    generator = torch.Generator().manual_seed(n)
    pieces = []
    for _ in range(16):
        bits = torch.rand(1 << 16, n, generator=generator).argsort(1) < n // 2
        pieces.append((bits.long() << torch.arange(n)).sum(1))
    drawn, every = torch.cat(pieces), (1 << n) - 1 if n < 64 else -1
    found = torch.empty(count, dtype=torch.int64)
    for i, piece in enumerate(found.split(len(drawn))):
        turn = i * 7 % n
        low = drawn & ((1 << n - turn) - 1 if turn else every)
        high = drawn >> n - turn & ((1 << turn) - 1) if turn else torch.zeros_like(drawn)
        turned = (low << turn) | high
        piece.copy_((turned ^ every if i % 2 else turned)[: len(piece)])
    return found


def expanded(centred: torch.Tensor, given: torch.Tensor, k: int):
    """The k best: 2^14 codes at a time are expanded, multiplied and reduced."""
    n, shifts = len(centred), torch.arange(len(centred))
    values = torch.empty(len(given), dtype=centred.dtype)
    for piece, out in zip(given.split(PIECE), values.split(PIECE), strict=True):
        bits = ((piece[:, None] >> shifts) & 1).to(centred.dtype)
        forms = ((bits @ centred) * bits).sum(1)
        out.copy_(forms.clamp(min=0).sqrt() / (n - bits.sum(1)))
    return values.topk(k)


def centred_gram(n: int) -> torch.Tensor:
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    return centring @ gram(n) @ centring


@pytest.mark.parametrize("column", MEMBERS)
@pytest.mark.parametrize("row", [*OURS, EXPANDED])
def test_code_topk(row, column, measure):
    n, mine = MEMBERS[column], row in OURS
    count = CODES if mine else THEIRS
    device = testing.device_of(row.split()[-1]) if mine else "cpu"
    given = codes(n, CODES)[:count]
    if mine:
        there, matrix, backend = given.to(device), gram(n), row.split()[-1]
        call = lambda: ops.code_topk(matrix, there, K, backend=backend)  # noqa: E731
    else:
        matrix = centred_gram(n).float()
        call = lambda: expanded(matrix, given, K)  # noqa: E731

    def check(answer):
        exact = expanded(centred_gram(n), given[:THEIRS], K)
        few = ops.code_topk(matrix, there[:THEIRS], K, backend=backend) if mine else answer
        torch.testing.assert_close(few.values.cpu().double(), exact.values, rtol=1e-5, atol=0)
        if mine:
            own = expanded(centred_gram(n), given[answer.indices.cpu()], K)
            torch.testing.assert_close(answer.values.cpu(), own.values, rtol=1e-9, atol=0)

    measure(
        Here(call, device),
        check=check,
        table=TABLE,
        row=row,
        column=column,
        ours=mine,
        work=float(count),
        unit="codes",
        bytes=8 * count,
        note=f"timed on {count:.0e} codes",
        rounds=5 if mine else 3,
        extra={"shape": {"members": n, "codes": count, "k": K}}
        | (memory.peak_mib("bench_code_topk", str(n)) if mine and device == "cpu" else {}),
    )


if __name__ == "__main__":  # a process of its own, with nothing of an earlier call, for the memory it takes
    import sys

    members = int(sys.argv[1])
    some, matrix = codes(members, 20_000_000), gram(members)
    memory.print_peak(lambda: ops.code_topk(matrix, some, K, backend="cpu"))
