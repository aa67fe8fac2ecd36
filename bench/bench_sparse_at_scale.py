"""Sparse projection of a whole U-Net's gradients on a GPU, beside sjlt and beside a copy of the gradients."""

import functools

import pytest
import torch

from bench.contenders import Here
from bench.figures import Goal, lead
from pyattr import ops, testing

PARAMETERS = 35_746_307  # DDPM's U-Net for CIFAR-10
SHARED = 32  # the largest batch that sjlt can take: it counts elements in 32 bits
BATCHES = (1, SHARED, 64)
PROJ_DIMS = (4096, 1 << 20)
NONZEROS = (1, 4)
SEED = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPY = "copy of float32 gradients"
GPU = torch.cuda.is_available()


def table_of(proj_dim: int) -> str:
    return f"sparse_project_at_scale_{proj_dim}"


def against_copy(proj_dim: int, nonzeros: int) -> Goal:
    return Goal(
        table_of(proj_dim),
        f"B=64, float32, s={nonzeros}: at least 75% of the bandwidth of a copy",
        lead(f"pyattr cuda float32 s={nonzeros}", COPY, "B=64"),
        0.75,
    )


def against_sjlt(nonzeros: int, wanted: float) -> Goal:
    ours, theirs = (f"{who} float32 s={nonzeros}" for who in ("pyattr cuda", "sjlt"))
    return Goal(
        table_of(4096),
        f"B={SHARED}, float32, s={nonzeros}: at least {wanted:.0f} times sjlt",
        lead(ours, theirs, f"B={SHARED}"),
        wanted,
    )


GOALS = [
    against_copy(4096, 1),
    against_copy(4096, 4),
    against_copy(1 << 20, 1),
    against_sjlt(1, 5),
    against_sjlt(4, 10),
]


@functools.cache
def gradients(dtype: torch.dtype) -> torch.Tensor:
    """[64, P] of every contender, drawn on the GPU."""
    generator = torch.Generator("cuda").manual_seed(7)
    scale = 10 ** (-3 * torch.rand(PARAMETERS, generator=generator, device="cuda"))
    rows = torch.empty(BATCHES[-1], PARAMETERS, dtype=dtype, device="cuda")
    for row in rows:
        row.copy_(torch.randn(PARAMETERS, generator=generator, device="cuda") * scale)
    return rows


def check_norms(x, answer, nonzeros, scale):
    """A sketch keeps norms: |y| / (scale |g|) = sqrt(s) to within six standard deviations, sqrt(1 / (2 D))."""
    ratio = answer.double().norm(dim=1) / torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) / scale
    ratio /= nonzeros**0.5
    assert (ratio - 1).abs().max() <= 6 * (2 * answer.shape[1]) ** -0.5 + 2**-6, f"norm ratios {ratio.tolist()}"


@functools.cache
def expected(proj_dim: int, nonzeros: int, dtype: torch.dtype, row: int) -> torch.Tensor:
    """One sample by definition, in float64.  # [1, D]"""
    sample = gradients(dtype)[row : row + 1].double()
    return ops.sparse_project(sample, proj_dim, nonzeros=nonzeros, seed=SEED, backend="reference")


def check_ours(x, proj_dim, nonzeros):
    """The first and the last sample against the definition, all of them by their norms."""

    def check(answer):
        assert answer.shape == (x.shape[0], proj_dim), f"shape {tuple(answer.shape)}"
        check_norms(x, answer, nonzeros, 1.0)
        for row in {0, x.shape[0] - 1}:
            wanted = expected(proj_dim, nonzeros, x.dtype, row)
            error = ((answer[row : row + 1] - wanted).norm() / wanted.norm()).item()
            assert error <= 2e-6, f"norm error {error:.3g} of sample {row}, at most 2e-6 is right"

    return check


def check_equal(x):
    def check(answer):
        assert torch.equal(answer, x)

    return check


def rows() -> list[str]:
    if not GPU:
        return []
    usable = [name for name in testing.usable_backends("sparse_project") if testing.device_of(name) == "cuda"]
    ours = [f"pyattr {name} {dtype} s={s}" for name in usable for dtype in DTYPES for s in NONZEROS]
    return [*ours, *(f"sjlt float32 s={s}" for s in NONZEROS), COPY]


CASES = [pytest.param(proj_dim, row, id=f"{table_of(proj_dim)}-{row}") for proj_dim in PROJ_DIMS for row in rows()]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize(("proj_dim", "row"), CASES)
def test_sparse_at_scale(proj_dim, row, batch, measure, leave_out):
    table, column, who = table_of(proj_dim), f"B={batch}", row.split(" ")[0]
    dtype = torch.bfloat16 if "bfloat16" in row else torch.float32
    x = gradients(dtype)[:batch]
    traffic = x.element_size() * x.numel() + 4 * batch * proj_dim
    if who == "copy":
        traffic, target = 2 * x.element_size() * x.numel(), torch.empty_like(x)
        contender, check = Here(lambda: target.copy_(x), "cuda"), check_equal(x)
    else:
        nonzeros = int(row.rpartition("=")[2])
        if who == "pyattr":
            backend = row.split(" ")[1]
            contender = Here(
                lambda: ops.sparse_project(x, proj_dim, nonzeros=nonzeros, seed=SEED, backend=backend), "cuda"
            )
            check = check_ours(x, proj_dim, nonzeros)
        else:
            if batch * PARAMETERS >= 2**31:
                leave_out(table, row, column, "sjlt counts elements in 32 bits")
            try:
                from sjlt import SJLTProjection
            except ImportError as error:
                leave_out(table, row, column, f"sjlt is not installed: {error}")
            projection = SJLTProjection(PARAMETERS, proj_dim, c=nonzeros)
            contender = Here(lambda: projection(x), "cuda")

            def check(answer):
                check_norms(x, answer, nonzeros, nonzeros**-0.5)

    torch.cuda.reset_peak_memory_stats()
    before, extra = torch.cuda.memory_allocated(), {"shape": {"B": batch, "P": PARAMETERS, "D": proj_dim}}

    def check_and_note_memory(answer):
        extra["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        check(answer)

    measure(
        contender,
        check=check_and_note_memory,
        table=table,
        row=row,
        column=column,
        ours=who == "pyattr",
        work=traffic,
        unit="bytes to and from memory",
        bytes=traffic,
        rounds=20,
        extra=extra,
    )
