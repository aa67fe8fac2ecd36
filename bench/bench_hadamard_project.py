"""hadamard_project [B, P] -> [B, D] beside the ways to write it with libraries, in bytes of gradients per second."""

import functools
import sys

import pytest
import scipy.linalg
import torch

from bench import machine, projection
from bench.contenders import Here, Worker, process
from bench.figures import Goal, lead
from pyattr import ops, testing
from pyattr.reference.hadamard_project import hadamard_matrix, hadamard_rows
from pyattr.reference.permutation import permutation

TABLE, SEED = "hadamard_project", 20
PARAMETERS, PROJ_DIM, BATCHES = 1 << 20, 4096, (1, 16)  # P, D, B
SMALL = 4096  # P and N of the contenders that multiply by a whole matrix
TRANSFORM = "torch, whole transform in memory, then a gather"
MATMUL = "scipy.linalg.hadamard in memory, torch.matmul"


def rows() -> list[str]:
    usable = testing.usable_backends("hadamard_project")
    found = [f"pyattr {name}" for name in usable if testing.device_of(name) == "cuda"]
    if "cpu" in usable:
        found += [f"pyattr cpu {level}" for level in projection.simd_levels()]
    return [*found, "pyattr reference", TRANSFORM, MATMUL]


FASTEST = ("pyattr cpu avx512", "pyattr cpu avx2")
GOALS = [
    Goal(TABLE, f"{column}: at least 5 times the whole transform in torch", lead(FASTEST, TRANSFORM, column), 5)
    for column in ("B=1", "B=16")
]


@functools.cache
def gradients(batch: int, parameters: int, device: str = "cpu") -> torch.Tensor:
    """The same rows for every contender.  # [B, P]"""
    return testing.make_gradients(BATCHES[-1], parameters, seed=7)[:batch].contiguous().to(device)


@functools.cache
def signed_rows(parameters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Our matrix by way of its row 0: H[r_j, p] s_p = H[r_j xor r_0, p] * (H[r_0, p] s_p).  # signs [P], r_j xor r_0 [D]"""
    chosen = permutation(torch.arange(PROJ_DIM), hadamard_rows(parameters), SEED)
    first = hadamard_matrix(torch.tensor([0]), torch.arange(parameters), parameters, SEED)[0]
    return first.float(), chosen ^ chosen[0]


def by_transform(x: torch.Tensor) -> torch.Tensor:
    """log2 N whole passes over memory."""
    signs, taken = signed_rows(x.shape[1])
    y = x * signs
    distance = x.shape[1] // 2
    while distance:
        y = y.view(x.shape[0], -1, 2, distance)
        y = torch.stack((y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]), 2)
        distance //= 2
    return y.view(x.shape[0], -1)[:, taken]


@functools.cache
def stored_matrix() -> torch.Tensor:
    signs, taken = signed_rows(SMALL)
    return torch.from_numpy(scipy.linalg.hadamard(SMALL)).float()[taken] * signs  # [D, P]


@functools.cache
def expected(parameters: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight outputs by definition in float64, first and last among them."""
    which = torch.tensor([0, 1, 2, 3, PROJ_DIM // 2, PROJ_DIM - 3, PROJ_DIM - 2, PROJ_DIM - 1])
    x = gradients(batch, parameters).double()
    made = [x @ hadamard_matrix(row[None], torch.arange(parameters), parameters, SEED).T for row in which]
    return which, torch.cat(made, dim=1)


def check(parameters: int, batch: int):
    def compare(answer):
        assert answer.shape == (batch, PROJ_DIM), f"shape {tuple(answer.shape)}"
        which, wanted = expected(parameters, batch)
        budget = gradients(batch, parameters).abs().sum(1, dtype=torch.float64)[:, None]
        worst = ((answer.cpu().double()[:, which] - wanted).abs() / budget).max().item()
        assert worst <= 2**-17, f"error {worst:.3g} of sum |g|, at most {2**-17:.3g} is right"

    return compare


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize("row", rows())
def test_hadamard_project(row, batch, measure):
    parameters = SMALL if row in (MATMUL, "pyattr reference") else PARAMETERS
    level = row.removeprefix("pyattr cpu ")
    device = "cuda" if row in ("pyattr cuda", "pyattr triton") else "cpu"
    x = gradients(batch, parameters, device)
    if row == TRANSFORM:
        contender = Here(lambda: by_transform(x))
    elif row == MATMUL:
        matrix = stored_matrix()
        contender = Here(lambda: x @ matrix.T)
    elif level != row and level != machine.simd_level():
        # PYATTR_SIMD is read once per process, so another level needs another process.
        other = process(sys.executable, {"PYATTR_SIMD": level})
        contender = Worker("pyattr", x, other, proj_dim=PROJ_DIM, kind="hadamard", seed=SEED)
    else:
        backend = row.split()[1]
        contender = Here(lambda: ops.hadamard_project(x, PROJ_DIM, seed=SEED, backend=backend), device)
    measure(
        contender,
        check=check(parameters, batch),
        table=TABLE,
        row=row,
        column=f"B={batch}",
        ours=row.startswith("pyattr"),
        work=4 * batch * parameters,
        unit="bytes of gradients",
        bytes=4 * batch * (parameters + PROJ_DIM) + (4 * PROJ_DIM * SMALL if row == MATMUL else 0),
        note=f"P={SMALL}" if parameters == SMALL else "",
        extra={"shape": {"B": batch, "P": parameters, "D": PROJ_DIM}},
    )
