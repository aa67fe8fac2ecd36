"""On a GPU: fused layer projections beside forming the gradients; multisketch and Hadamard of a whole U-Net's gradients."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

from bench import bench_conv2d_grad_project, bench_kron_grad_project, bench_linear_grad_project, layers
from bench.contenders import Here
from bench.figures import Goal, lead
from pyattr import ops

PARAMETERS, SEED = 35_746_307, 20  # DDPM's U-Net for CIFAR-10
GPU = torch.cuda.is_available()
LAYERS = {
    "conv2d_grad_project": bench_conv2d_grad_project.SETTINGS,
    "linear_grad_project": bench_linear_grad_project.SETTINGS,
}
OURS, FORM, UNFOLD = (
    "pyattr cuda",
    "torch: form the gradients, then project",
    "torch: copy the patches, project, multiply",
)
KRON = {
    OURS: functools.partial(bench_kron_grad_project.ours, backend="cuda"),
    FORM: bench_kron_grad_project.form_then_project,
    UNFOLD: bench_kron_grad_project.unfold_then_project,
}
# Whole gradients: name -> (rows, batches, proj_dim)
SKETCH, DENSE, COPY = "pyattr cuda float32", "pyattr cuda rademacher_project bfloat16", "copy of float32 gradients"
WHOLE = {"multisketch_project": ((SKETCH, DENSE), (1, 64), 32768), "hadamard_project": ((SKETCH, COPY), (1, 16), 4096)}


def table_of(op: str) -> str:
    return f"{op}_at_scale_{WHOLE[op][2] if op in WHOLE else 4096}"


def of(op: str, above: str, below: tuple[str, ...], column: str, text: str, wanted: float) -> Goal:
    """How many times the work per second of the fastest of ``below`` the row ``above`` does."""
    return Goal(table_of(op), f"{column}: at least {text}", lead(above, below, column), wanted)


GOALS = [
    *(
        of(op, f"pyattr cuda {kind}", (f"torch: form by matmul, then {kind}", f"torch: form by vmap(grad), then {kind}"),
           column, f"{wanted} times forming, then projecting ({kind})", wanted)
        for op, settings in LAYERS.items() for column in settings for kind, wanted in (("sparse", 1.5), ("rademacher", 1.0))
    ),
    *(
        of("kron_grad_project", OURS, (UNFOLD,), column, "3 times copying the patches", 3)
        for column, setting in bench_kron_grad_project.SETTINGS.items() if setting.is_convolution
    ),
    of("multisketch_project", SKETCH, (DENSE,), "B=64", "15 times the dense projection", 15),
    Goal(table_of("multisketch_project"), "B=64: at most 12 ms", lambda rate: rate(SKETCH, "B=64"), 64 * PARAMETERS / 0.012),
]  # fmt: skip


@functools.cache
def gradients(dtype: torch.dtype) -> torch.Tensor:
    """[64, P] of every contender, drawn on the GPU."""
    generator = torch.Generator("cuda").manual_seed(7)
    return torch.randn(64, PARAMETERS, generator=generator, device="cuda").to(dtype)


@functools.cache
def on_gpu(op: str, column: str):
    return dataclasses.replace(
        (LAYERS | {"kron_grad_project": bench_kron_grad_project.SETTINGS})[op][column], device="cuda"
    )


def time_on_gpu(measure, call: Callable, check: Callable, **figure) -> None:
    """Check and time a call, with the memory that it takes at most beside what is there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, extra = torch.cuda.memory_allocated(), {}

    def check_and_note_memory(answer):
        extra["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        check(answer)

    measure(
        Here(call, "cuda"),
        check=check_and_note_memory,
        ours=figure["row"].startswith("pyattr"),
        rounds=10,
        extra=extra,
        **figure,
    )


def time_layer(measure, call: Callable, check: Callable, setting, **figure) -> None:
    if isinstance(setting, bench_kron_grad_project.Setting):
        work = {"work": setting.batch * setting.positions, "unit": "positions"}
    else:
        work = {"work": setting.batch * setting.parameters, "unit": "gradient entries"}
    acts, errs = setting.data
    size = 4 * (acts.numel() + errs.numel() + setting.batch * layers.PROJ_DIM)
    time_on_gpu(measure, call, check, bytes=size, **work, **figure)


ON_GPU = pytest.mark.skipif(not GPU, reason="torch sees no GPU")


@ON_GPU
@pytest.mark.parametrize("row", layers.ROWS)
@pytest.mark.parametrize(
    ("op", "column"),
    [pytest.param(op, column, id=f"{table_of(op)}-{column}") for op in LAYERS for column in LAYERS[op]],
)
def test_fused_layers(op, column, row, measure):
    setting = on_gpu(op, column)
    row_here = row.replace("pyattr cpu", "pyattr cuda")
    time_layer(
        measure, lambda: layers.run(setting, row, "cuda"), layers.check(setting, layers.ROWS[row]), setting,
        table=table_of(op), row=row_here, column=column, kind=layers.ROWS[row],
    )  # fmt: skip


@ON_GPU
@pytest.mark.parametrize("row", KRON)
@pytest.mark.parametrize(
    "column",
    [
        pytest.param(column, id=f"{table_of('kron_grad_project')}-{column}")
        for column in bench_kron_grad_project.SETTINGS
    ],
)
def test_two_sided(column, row, measure):
    setting = on_gpu("kron_grad_project", column)
    if row == UNFOLD and not setting.is_convolution:
        pytest.skip("a linear layer has no patches")
    assert setting.factors  # torch's rows have them in memory
    time_layer(
        measure, lambda: KRON[row](setting), bench_kron_grad_project.check(setting, row), setting,
        table=table_of("kron_grad_project"), row=row, column=column,
    )  # fmt: skip


@ON_GPU
@pytest.mark.parametrize(
    ("op", "row", "batch"),
    [
        pytest.param(op, row, batch, id=f"{table_of(op)}-{row}-B{batch}")
        for op, (rows, batches, _) in WHOLE.items() for row in rows for batch in batches
    ],
)  # fmt: skip
def test_whole_gradients(op, row, batch, measure):
    proj_dim = WHOLE[op][2]
    x = gradients(torch.bfloat16 if row == DENSE else torch.float32)[:batch]
    project = functools.partial(ops.rademacher_project if row == DENSE else getattr(ops, op), seed=SEED, backend="cuda")
    copy = torch.empty_like(x) if row == COPY else None

    def check(answer):
        """Norms are kept: six standard deviations, sqrt(1 / (2 D)), the sketch's 1 / 2^10 and bfloat16's rounding."""
        if row == COPY:
            assert torch.equal(answer, x)
            return
        ratio = answer.double().norm(dim=1) / torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) / proj_dim**0.5
        assert (ratio - 1).abs().max() <= 6 * (2 * proj_dim) ** -0.5 + 2**-6, f"norm ratios {ratio.tolist()}"

    time_on_gpu(
        measure, (lambda: copy.copy_(x)) if row == COPY else (lambda: project(x, proj_dim)), check,
        table=table_of(op), row=row, column=f"B={batch}", work=batch * PARAMETERS, unit="gradient entries",
        bytes=x.element_size() * batch * PARAMETERS * (2 if row == COPY else 1) + 4 * batch * proj_dim,
    )  # fmt: skip
