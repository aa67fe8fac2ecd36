"""What the benchmarks of the fused layer projections share: form the gradients whole, then project; or never form them."""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from pyattr import ops

from . import machine
from .contenders import Here
from .figures import Goal, lead
from .memory import peak_mib

SEED, PROJ_DIM = 3, 4096
KINDS = {"sparse": ops.sparse_project, "rademacher": ops.rademacher_project}


def row_names(kind: str) -> tuple[str, str, str]:
    """Ours; the gradients by one matrix product per sample, then projected; by vmap(grad), then projected."""
    return f"pyattr cpu {kind}", f"torch: form by matmul, then {kind}", f"torch: form by vmap(grad), then {kind}"


ROWS = {row: kind for kind in KINDS for row in row_names(kind)}


def by_matmul(setting) -> torch.Tensor:
    """Every sample's gradient [B, P]: errors times (copied) patches."""
    return torch.bmm(setting.errs(), setting.patches().mT).flatten(1)


def by_vmap(setting) -> torch.Tensor:
    """Every sample's gradient [B, P], as torch.func gives it."""
    layer = setting.layer().to(setting.device)

    def loss(parameters, x, e):
        return (functional_call(layer, parameters, (x[None],))[0] * e).sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    return vmap(grad(loss), (None, 0, 0))(parameters, *setting.data)["weight"].flatten(1)


def run(setting, row: str, backend: str = "cpu") -> torch.Tensor:
    """One contender's answer.  # [B, D]"""
    kind = ROWS[row]
    if row.startswith("pyattr"):
        return setting.project(*setting.data, kind=kind, backend=backend)
    form = by_matmul if "matmul" in row else by_vmap
    return KINDS[kind](form(setting), PROJ_DIM, seed=SEED, backend=backend)


def warm_up() -> None:
    """What the libraries load and keep at their first products is no contender's."""
    F.conv2d(torch.randn(2, 8, 8, 8), torch.randn(8, 8, 3, 3)), torch.randn(2, 64, 64) @ torch.randn(2, 64, 64)
    ops.sparse_project(torch.randn(2, 5000), 64), ops.rademacher_project(torch.randn(2, 5000), 64)


def goals(table: str, columns) -> list[Goal]:
    """Sparse 1.5 times the faster way to form and project, dense no slower."""
    wanted = {
        "sparse": (1.5, "at least 1.5 times forming, then projecting"),
        "rademacher": (1.0, "no slower than that"),
    }
    return [
        Goal(table, f"{column}, {kind}: {text}", lead(row_names(kind)[0], row_names(kind)[1:], column), least)
        for column in columns
        for kind, (least, text) in wanted.items()
    ]


def check(setting, kind: str):
    """First and last sample against the definition."""
    ends = [torch.stack([tensor[0], tensor[-1]]) for tensor in setting.data]
    wanted = setting.project(*(end.double() for end in ends), kind=kind, backend="reference")

    def run(answer):
        error = ((answer[[0, -1]] - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
        assert error < 1e-5, f"differs from the definition by {error:.2g} of its norm"

    return run


def measure_layer(module: str, table: str, setting, row: str, column: str, measure, leave_out) -> None:
    """Check a contender, then time it, on the CPU."""
    ours = row.startswith("pyattr")
    formed = 4 * setting.batch * setting.parameters
    if not ours and 2.5 * formed > machine.available_bytes():
        leave_out(table, row, column, f"the formed gradients take {formed / 2**30:.1f} GiB, too much of what is free")
    acts, errs = setting.data
    measure(
        Here(lambda: run(setting, row)),
        check=check(setting, ROWS[row]),
        table=table,
        row=row,
        column=column,
        ours=ours,
        kind=ROWS[row],
        work=setting.batch * setting.parameters,
        unit="gradient entries",
        bytes=4 * (acts.numel() + errs.numel() + setting.batch * PROJ_DIM),
        rounds=7,
        extra=peak_mib(module, row, column),
    )
