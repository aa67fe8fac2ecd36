"""What the two dense projections' benchmarks share: inputs, contenders, the checks of their answers."""

import functools
import sys
import time
from dataclasses import dataclass

import torch

from pyattr import backends, ops, testing

from . import machine
from .contenders import Here, Worker, process
from .worker import bergson_identifier, bergson_key

PARAMETERS, PROJ_DIM, BATCHES = 262_144, 4096, (1, 16, 64)  # P, D, B
SEED = 20
BERGSON_BLOCK = 2**27  # entries of one of bergson's blocks; it starts a new matrix at each
UNITS = {"rademacher": ("sign-adds", "adds_per_s"), "gaussian": ("multiply-adds", "fmas_per_s")}


@functools.cache
def gradients(batch: int, parameters: int, device: str = "cpu") -> torch.Tensor:
    """The same rows for every contender, B of 64 and the first P of their entries.  # [B, P]"""
    rows = testing.make_gradients(BATCHES[-1], PARAMETERS, seed=7)
    return rows[:batch, :parameters].contiguous().to(device)


def matrix_rows(kind: str, rows: range, columns: int, seed: int = SEED, stream: int = 0) -> torch.Tensor:
    """Rows of our matrix in float64.  # [R, P]"""
    make = ops.sign_matrix if kind == "rademacher" else ops.normal_matrix
    return make(rows, range(columns), seed, stream).to(torch.float64)


@functools.cache
def expected(kind: str, rows: tuple[int, ...]) -> torch.Tensor:
    """Our projection onto a few rows of the matrix, by definition in float64.  # [B, R]"""
    x = gradients(BATCHES[-1], PARAMETERS).to(torch.float64)
    return torch.cat([x @ matrix_rows(kind, range(row, row + 1), PARAMETERS).T for row in rows], dim=1)


OUR_ROWS = {"rademacher": range(0, 8), "gaussian": range(8, 16)}  # where in the stored matrix they lie


@functools.cache
def stored_matrix(device: str, dtype: torch.dtype) -> torch.Tensor:
    """A [D', P] matrix in memory, eight rows of it ours for each kind, the rest random; D' = D where it fits.

    Only the rows that are checked have to be ours, and a matmul takes the same time whatever the others are.
    """
    size = PARAMETERS * torch.empty(0, dtype=dtype).element_size()
    room = torch.cuda.mem_get_info()[0] if device == "cuda" else machine.available_bytes()
    rows = min(PROJ_DIM, max(64, int(0.45 * room / size) // 64 * 64))
    matrix = torch.empty(rows, PARAMETERS, dtype=dtype, device=device)
    matrix[:64].normal_(generator=torch.Generator(device).manual_seed(11))
    for start in range(64, rows, 64):
        matrix[start : start + 64] = matrix[:64]
    for kind, at in OUR_ROWS.items():
        matrix[at.start : at.stop] = matrix_rows(kind, range(8), PARAMETERS).to(device, dtype)
    return matrix


def check_ours(kind: str, batch: int, proj_dim: int):
    """Compare eight outputs, first and last among them, with the definition."""
    rows = (0, 1, 2, 3, proj_dim // 2, proj_dim - 3, proj_dim - 2, proj_dim - 1)
    return lambda answer: _close(answer, batch, proj_dim, expected(kind, rows)[:batch], list(rows), 2**-17)


def check_matmul(kind: str, batch: int, proj_dim: int, bound: float):
    """Compare the outputs of the rows that are ours with the definition."""
    wanted, rows = expected(kind, tuple(range(8)))[:batch], list(OUR_ROWS[kind])
    return lambda answer: _close(answer, batch, proj_dim, wanted, rows, bound)


def _close(answer, batch, proj_dim, wanted, rows, bound):
    assert answer.shape == (batch, proj_dim), f"shape {tuple(answer.shape)}"
    budget = gradients(batch, PARAMETERS).abs().sum(dim=1, dtype=torch.float64)[:, None]
    worst = ((answer.cpu().to(torch.float64)[:, rows] - wanted).abs() / budget).max().item()
    assert worst <= bound, f"error {worst:.3g} of sum |g|, at most {bound:.3g} is right"


def check_norms(x: torch.Tensor, proj_dim: int, scale: float):
    """A random projection keeps norms: |y| / |x| = scale * sqrt(D) to within six standard deviations, sqrt(1 / (2 D))."""

    def check(answer):
        assert answer.shape == (x.shape[0], proj_dim), f"shape {tuple(answer.shape)}"
        ratio = answer.to(torch.float64).norm(dim=1) / x.to(torch.float64).norm(dim=1) / (scale * proj_dim**0.5)
        assert (ratio - 1).abs().max() <= 6 * (2 * proj_dim) ** -0.5, f"norm ratios {ratio.tolist()}"

    return check


def check_bergson(kind: str, x: torch.Tensor, proj_dim: int, seed: int):
    """bergson's matrix is ours under another key, so its answer must be ours divided by sqrt(D)."""
    width = BERGSON_BLOCK // proj_dim
    project = getattr(ops, f"{kind}_project")

    def check(answer):
        ours = torch.zeros(x.shape[0], proj_dim)
        for start in range(0, x.shape[1], width):
            seed_word, stream_word = bergson_key(f"{bergson_identifier(seed)}/{start}")
            ours += project(x[:, start : start + width], proj_dim, seed=seed_word, stream=stream_word)
        worst = ((answer - ours * proj_dim**-0.5).abs() / x.abs().sum(dim=1)[:, None]).max().item() * proj_dim**0.5
        assert worst <= 2**-17, f"differs from ours by {worst:.3g} of sum |g|"

    return check


@dataclass(frozen=True)
class Case:
    """A row of the table: who, and how much of the full shape it is given.

    Attributes:
        row: its name in the table.
        proj_dim: D that it is timed at; less than the full D where it would take minutes.
        parameters: P that it is timed at.
        device: where its inputs lie.
    """

    row: str
    proj_dim: int = PROJ_DIM
    parameters: int = PARAMETERS
    device: str = "cpu"

    @property
    def ours(self) -> bool:
        return self.row.startswith("pyattr")

    def note(self) -> str:
        """The shape where it is not the full one."""
        part = [f"D={self.proj_dim}"] * (self.proj_dim != PROJ_DIM)
        return ", ".join(part + [f"P={self.parameters}"] * (self.parameters != PARAMETERS))


def simd_levels() -> list[str]:
    """The CPU kernels' levels on this machine, the highest first."""
    module = backends.extension()
    return [] if isinstance(module, str) else module.simd_levels()[::-1]


def cases(kind: str, small: int) -> list[Case]:
    """Every contender that this machine could run. ``small`` is D for our scalar level."""
    usable = testing.usable_backends(f"{kind}_project")
    found = [Case(f"pyattr {name}", device="cuda") for name in usable if testing.device_of(name) == "cuda"]
    if "cuda" in [case.device for case in found]:
        found += [Case(f"torch.matmul {dtype}, matrix on the GPU", device="cuda") for dtype in ("float32", "bfloat16")]
    if "cpu" in usable:
        found += [Case(f"pyattr cpu {level}", small if level == "scalar" else PROJ_DIM) for level in simd_levels()]
    found += [
        Case("pyattr reference", 8),
        Case("torch.matmul, matrix in memory"),
        Case("trak BasicProjector", 200),  # it works in blocks of 100 columns, so whole blocks cost the same each
        Case("dattri random_project", 200),
        # one block of its own, or a quarter of one where each entry costs it a logarithm and a sine
        Case("bergson project_global", parameters=BERGSON_BLOCK // PROJ_DIM // (1 if kind == "rademacher" else 4)),
        Case("scikit-learn GaussianRandomProjection", 256),
    ]
    return found


def matmul(batch: int, device: str, dtype: torch.dtype):
    """The faster of the two ways to multiply by a [D', P] matrix in memory, both leaving [B, D'], and D'."""
    matrix, x = stored_matrix(device, dtype), gradients(batch, PARAMETERS, device).to(dtype)

    def ways(part):
        return [Here(lambda: x @ part.T, device), Here(lambda: (part @ x.T).T, device)]

    trials = [(way.first(), min(way.round() for _ in range(3)))[1] for way in ways(matrix[:512])]
    return ways(matrix)[trials.index(min(trials))], matrix.shape[0]


def run(kind: str, case: Case, batch: int, measure, leave_out, peer_python) -> None:
    """Set a contender up, check its answer and time it."""
    table, column = f"{kind}_project", f"B={batch}"
    unit, ceiling = UNITS[kind]
    x = gradients(batch, case.parameters, case.device)
    note, extra, matrix_bytes, proj_dim = case.note(), {}, 0, case.proj_dim
    who, _, rest = case.row.partition(" ")
    if case.row.startswith("pyattr cpu") and rest.removeprefix("cpu ") != machine.simd_level():
        # PYATTR_SIMD is read once per process, so another level needs another process.
        contender = Worker(
            "pyattr",
            x,
            process(sys.executable, {"PYATTR_SIMD": rest.removeprefix("cpu ")}),
            proj_dim=proj_dim,
            kind=kind,
            seed=SEED,
        )
        check = check_ours(kind, batch, proj_dim)
    elif who == "pyattr":
        project = getattr(ops, f"{kind}_project")
        contender = Here(lambda: project(x, proj_dim, seed=SEED, backend=rest.split()[0]), case.device)
        check = check_ours(kind, batch, proj_dim)
    elif who.startswith("torch.matmul"):
        dtype = torch.bfloat16 if "bfloat16" in case.row else torch.float32
        contender, proj_dim = matmul(batch, case.device, dtype)
        note = "" if proj_dim == PROJ_DIM else f"D={proj_dim}: all that fits"
        matrix_bytes = proj_dim * PARAMETERS * dtype.itemsize
        check = check_matmul(kind, batch, proj_dim, 2**-7 if dtype == torch.bfloat16 else 2**-17)
    elif who == "scikit-learn":
        try:
            from sklearn.random_projection import GaussianRandomProjection
        except ImportError:
            leave_out(table, case.row, column, "scikit-learn is not installed: install pyattr[dev]")
        array = x.numpy()
        started = time.perf_counter()
        projection = GaussianRandomProjection(proj_dim, random_state=SEED).fit(array)
        extra = {"fit_seconds": round(time.perf_counter() - started, 3)}
        note += ", matrix (float64) in memory, not counting the time to make it"
        matrix_bytes = projection.components_.nbytes
        contender = Here(lambda: torch.from_numpy(projection.transform(array)))
        check = check_norms(x, proj_dim, proj_dim**-0.5)
    else:
        if peer_python is None:
            leave_out(
                table, case.row, column, "the peers' environment is missing or left out: run `python -m bench.peers`"
            )
        contender = Worker(who, x, process(peer_python, {}), proj_dim=proj_dim, kind=kind, seed=SEED)
        scale = 1.0 if who == "trak" else proj_dim**-0.5
        check = check_bergson(kind, x, proj_dim, SEED) if who == "bergson" else check_norms(x, proj_dim, scale)
    measure(
        contender,
        check=check,
        table=table,
        row=case.row,
        column=column,
        ours=case.ours,
        work=batch * case.parameters * proj_dim,
        unit=unit,
        bytes=4 * batch * (case.parameters + proj_dim) + matrix_bytes,
        ceiling=ceiling,
        note=note,
        extra={"shape": {"B": batch, "P": case.parameters, "D": proj_dim}, **extra},
    )
