"""patch_topk of one query beside the published procedure in torch, in pairs of patches that may match per second.

The procedure takes most of a minute at these sizes; it is timed on the first of its batches of query positions, whose
cost is the same for each. The answers are compared before: ours with all of its own on a smaller bank, and with the
definition in float64.
"""

import functools
import sys

import pytest
import torch
from torch.nn import functional

from bench import memory
from bench.contenders import Here
from bench.figures import Goal, lead
from bench.patches import (
    VARIANCE,
    Case,
    bank,
    convolution_normaliser,
    interior,
    published_procedure,
    query,
    unfold_and_cdist,
)
from pyattr import ops, testing

TABLE = "patch_topk"
COLUMNS = {
    "N=5000, 32x32, p=7, k=10": Case(5000, 32, 7, 10),
    "N=5000, 32x32, p=7, k=100": Case(5000, 32, 7, 100),
    "N=5000, 32x32, p=15, k=10": Case(5000, 32, 15, 10),
    "N=5000, 32x32, p=7, k=10, zero": Case(5000, 32, 7, 10, "zero"),
    "N=5000, 32x32, p=15, k=10, zero": Case(5000, 32, 15, 10, "zero"),
    "N=5000, 32x32, p=14, k=10, lowres": Case(5000, 32, 14, 10, lowres=True),
    "N=50000, 32x32, p=7, k=10": Case(50000, 32, 7, 10),
    "N=1000, 64x64, p=7, k=10": Case(1000, 64, 7, 10),
}
PUBLISHED, CONVOLUTION, CDIST = (
    "published procedure in torch",
    "torch conv2d and logsumexp, no top k",
    "torch unfold and cdist, no top k",
)
OTHERS = {PUBLISHED: 64, CONVOLUTION: 64, CDIST: 8}  # and the positions of the query that are timed
COMPARED = ("N=5000, 32x32, p=7, k=10", "N=5000, 32x32, p=7, k=100", "N=5000, 32x32, p=15, k=10")
OURS = [f"pyattr {name}" for name in testing.usable_backends("patch_topk") if name != "reference"]


def _times(column, wanted):
    measured = lead("pyattr cpu", PUBLISHED, column)
    return Goal(TABLE, f"{column}: at least {wanted} times the published procedure", measured, wanted)


def _pairs_per_second(column, seconds):
    least = COLUMNS[column].pairs / seconds
    return Goal(TABLE, f"{column}: at most {seconds} s", lambda rate: rate("pyattr cpu", column), least)


def _of_p7(column, other, share):
    """Seconds of p = 15 in those of p = 7, upside down: at least 1 / share."""

    def measured(rate):
        large, small = rate("pyattr cpu", column), rate("pyattr cpu", other)
        return large / COLUMNS[column].pairs / (small / COLUMNS[other].pairs) if large and small else None

    return Goal(TABLE, f"{column}: at most {share} times the seconds of p=7", measured, 1 / share)


GOALS = [
    _times("N=5000, 32x32, p=7, k=10", 40),
    _pairs_per_second("N=5000, 32x32, p=7, k=10", 1.3),
    _times("N=5000, 32x32, p=7, k=100", 20),
    _pairs_per_second("N=5000, 32x32, p=7, k=100", 2.5),
    _of_p7("N=5000, 32x32, p=15, k=10", "N=5000, 32x32, p=7, k=10", 0.6),
    _of_p7("N=5000, 32x32, p=15, k=10, zero", "N=5000, 32x32, p=7, k=10, zero", 1.4),
]


def ours(case: Case, backend: str, device: str):
    x, images = query(case).to(device), bank(case.images + 1, case.size, case.channels)[:-1].to(device)
    return lambda: ops.patch_topk(x, images, k=case.k, lowres=case.lowres, backend=backend, **case.options)


@functools.cache
def agrees(patch_size: int, k: int) -> bool:
    """Ours and the published procedure on a small bank, its expansion in float32 with the mask 10 that it advises."""
    small = Case(20, 20, patch_size, k)
    theirs = published_procedure(small)()
    found = ours(small, "cpu", "cpu")().weights[0]
    return bool(((found - theirs).abs() <= 5e-3 * theirs.max()).all())


def exact_normaliser(case: Case, positions: int, images: int) -> torch.Tensor:
    """log Z of the first interior positions over the first images, in float64.  # [positions]"""
    x = functional.unfold(query(case).double(), case.patch_size)[0].T[:positions]
    y = (2 * bank(case.images + 1, case.size, case.channels)[:images].double() - 255) / 255 * (1 - VARIANCE) ** 0.5
    patches = functional.unfold(y, case.patch_size).mT.flatten(0, 1)
    d = torch.cdist(x, patches, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.logsumexp(d / (-2 * VARIANCE), 1)


def rows():
    for column in COLUMNS:
        yield from ((row, column) for row in OURS)
        yield from ((row, column) for row in OTHERS if column in COMPARED and not (row == CDIST and "p=15" in column))


@pytest.mark.parametrize(("row", "column"), list(rows()))
def test_patch_topk(row, column, measure):
    case = COLUMNS[column]
    mine = row.startswith("pyattr")
    backend = row.split()[-1] if mine else "cpu"
    device = testing.device_of(backend)
    positions = case.grid**2
    share = 1.0 if mine else OTHERS[row] / (positions if row == PUBLISHED else (case.size - case.patch_size + 1) ** 2)
    if mine:
        call = ours(case, backend, device)
    else:
        maker = {PUBLISHED: published_procedure, CONVOLUTION: convolution_normaliser, CDIST: unfold_and_cdist}[row]
        call = maker(case, positions=OTHERS[row])

    def check(answer):
        if mine:
            assert answer.weights.shape == (1, case.images) and (answer.weights >= 0).all()
            assert agrees(case.patch_size, case.k) or case.lowres
            if case.border == "class" and not case.lowres:  # a few images alone have the normaliser of the definition
                few = Case(6, case.size, case.patch_size, case.k)
                images = bank(case.images + 1, case.size, case.channels)[:6].to(device)
                found = ops.patch_topk(
                    query(case).to(device), images, k=1, backend=backend, **few.options
                ).log_normaliser[0]
                inside = found[interior(case), interior(case)].flatten()[:20].cpu()
                torch.testing.assert_close(inside.double(), exact_normaliser(case, 20, 6), rtol=1e-6, atol=1e-4)
        elif row == PUBLISHED:
            assert answer.shape == (case.images,) and agrees(case.patch_size, case.k)
        else:
            few = ours(case, "cpu", "cpu")().log_normaliser[0][interior(case), interior(case)].flatten()[: len(answer)]
            torch.testing.assert_close(answer.double(), few, rtol=1e-4, atol=1e-2)

    measure(
        Here(call, device),
        check=check,
        table=TABLE,
        row=row,
        column=column,
        ours=mine,
        work=case.pairs * share,
        unit="pairs of patches that may match",
        bytes=case.images * case.channels * case.size**2,
        note="" if mine else f"timed on {OTHERS[row]} positions of the query",
        rounds=5 if mine else 2,
        extra={"shape": vars(case), **(memory.peak_mib("bench_patch_topk", column) if row == "pyattr cpu" else {})},
    )


if __name__ == "__main__":  # a process of its own, for the memory it takes
    wanted = COLUMNS[sys.argv[1]]
    call = ours(wanted, "cpu", "cpu")
    memory.print_peak(call)
