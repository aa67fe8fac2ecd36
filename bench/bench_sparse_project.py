"""sparse_project [B, P] -> [B, D] beside other ways to sketch, in bytes of gradients read per second."""

import functools
import sys
from dataclasses import dataclass

import pytest
import torch

from bench import machine, projection
from bench.contenders import Here, Worker, process
from bench.figures import Goal
from pyattr import ops, testing

TABLE, SEED = "sparse_project", 20
SAMPLES, PARAMETERS = 16, 1 << 22
COLUMNS = {
    "B=1, D=4096": (1, 4096, 1),
    "B=16, D=4096": (16, 4096, 1),
    "B=16, D=4096, 4 nonzeros": (16, 4096, 4),
    "B=16, D=2^20": (16, 1 << 20, 1),
}


@dataclass(frozen=True)
class Shape:
    """What a column of the table projects. One sample is as long as all of sixteen: 268 MB, out of every cache."""

    batch: int
    proj_dim: int
    nonzeros: int

    @property
    def parameters(self) -> int:
        return PARAMETERS * SAMPLES // self.batch


@functools.cache
def gradients(batch: int) -> torch.Tensor:
    return testing.make_gradients(SAMPLES, PARAMETERS, seed=7).view(batch, -1)  # [B, P]


def index_add(x: torch.Tensor, shape: Shape):
    """SJLT as torch writes it: stored rows and signs, one index_add a nonzero; ours, so that the answers agree."""
    rows, signs = ops.sketch_entries(torch.arange(shape.parameters), shape.proj_dim, nonzeros=shape.nonzeros, seed=SEED)

    def call():
        out = torch.zeros(shape.batch, shape.proj_dim)
        for r in range(shape.nonzeros):
            out.index_add_(1, rows[:, r], x * signs[:, r])
        return out

    return call


def sparse_matmul(x: torch.Tensor, shape: Shape):
    """The stored matrix in SciPy's compressed rows, times the gradients."""
    import scipy.sparse

    columns = torch.arange(shape.parameters)
    rows, signs = ops.sketch_entries(columns, shape.proj_dim, nonzeros=shape.nonzeros, seed=SEED)
    entries = (signs.flatten().numpy(), (rows.flatten().numpy(), columns.repeat_interleave(shape.nonzeros).numpy()))
    matrix = scipy.sparse.csr_array(entries, shape=(shape.proj_dim, shape.parameters))
    array = x.numpy().T.copy()
    return lambda: torch.from_numpy((matrix @ array).T)


INDEX_ADD, SCIPY, READ = (
    "torch index_add, rows and signs in memory",
    "SciPy, matrix in memory",
    "torch.sum, reading alone",
)
LEVELS = [f"pyattr cpu {level}" for level in projection.simd_levels() if level != "avx512"]
ROWS = [*LEVELS, INDEX_ADD, SCIPY, READ]


def _fastest(rate, column):
    return max((r for r in (rate(row, column) for row in LEVELS) if r), default=None)


def _share(column):
    def measured(rate):
        ours, ceiling = _fastest(rate, column), rate("ceiling", "ram_read_bytes_per_s")
        return ours / ceiling if ours and ceiling else None

    return measured


GOALS = [
    Goal(TABLE, f"{column}: at least 60% of the memory's measured bandwidth", _share(column), 0.6)
    for column in ("B=1, D=4096", "B=16, D=4096")
]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_sparse_project(row, column, measure):
    shape = Shape(*COLUMNS[column])
    x = gradients(shape.batch)
    if row.startswith("pyattr"):
        level = row.split()[-1]
        options = {"proj_dim": shape.proj_dim, "nonzeros": shape.nonzeros, "seed": SEED}
        if level == machine.simd_level():
            contender = Here(lambda: ops.sparse_project(x, backend="cpu", **options))
        else:
            contender = Worker("sparse", x, process(sys.executable, {"PYATTR_SIMD": level}), **options)
    elif row == READ:
        contender = Here(x.sum)
    else:
        contender = Here((index_add if row == INDEX_ADD else sparse_matmul)(x, shape))

    def check(answer):
        if row == READ:
            return
        assert answer.shape == (shape.batch, shape.proj_dim)
        # A linear functional of every output: <Y, w> = <G, M^T w>, with the transpose made by the definition.
        weights = torch.randn(shape.batch, shape.proj_dim, generator=torch.Generator().manual_seed(1)).double()
        wanted = _back(column)
        found = (answer.double() * weights).sum(1)
        bound = 2.0**-20 * x.abs().sum(1).double() * 6
        assert ((found - wanted).abs() <= bound).all(), f"{found.tolist()}, not {wanted.tolist()}"

    measure(
        contender,
        check=check,
        table=TABLE,
        row=row,
        column=column,
        ours=row.startswith("pyattr"),
        work=4 * x.numel(),
        unit="bytes of gradients",
        bytes=4 * (x.numel() + shape.batch * shape.proj_dim),
        note="the transpose that it wants is made beforehand" if row == SCIPY else "",
        extra={"shape": {"B": shape.batch, "P": shape.parameters, "D": shape.proj_dim, "nonzeros": shape.nonzeros}},
    )


@functools.cache
def _back(column: str) -> torch.Tensor:
    """<G, M^T w> for the weights of the check, in float64, by the entries of the matrix.  # [B]"""
    shape = Shape(*COLUMNS[column])
    weights = torch.randn(shape.batch, shape.proj_dim, generator=torch.Generator().manual_seed(1)).double()
    x, total = gradients(shape.batch), torch.zeros(shape.batch, dtype=torch.float64)
    step = 1 << 18
    for start in range(0, shape.parameters, step):
        part = torch.arange(start, min(start + step, shape.parameters))
        rows, signs = ops.sketch_entries(part, shape.proj_dim, nonzeros=shape.nonzeros, seed=SEED)
        for r in range(shape.nonzeros):
            total += (x[:, part].double() * signs[:, r] * weights[:, rows[:, r]]).sum(1)
    return total
