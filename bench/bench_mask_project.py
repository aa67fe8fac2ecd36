"""mask_project [B, P] -> [B, D] beside a gather by indices that are ready, in values kept per second."""

import pytest
import torch

from bench.contenders import Here
from pyattr import ops, testing

TABLE, SEED = "mask_project", 20
PARAMETERS, PROJ_DIMS, BATCH = 1 << 20, (4096, 1 << 17), 16  # P, D, B
GATHER = "torch gather, indices in memory"


def rows() -> list[str]:
    usable = testing.usable_backends("mask_project")
    return [*(f"pyattr {name}" for name in usable), *(f"{GATHER}, {name}" for name in usable if name != "reference")]


@pytest.mark.parametrize("proj_dim", PROJ_DIMS, ids=lambda proj_dim: f"D{proj_dim}")
@pytest.mark.parametrize("row", rows())
def test_mask_project(row, proj_dim, measure):
    backend = row.split()[-1]
    x = testing.make_gradients(BATCH, PARAMETERS, device="cuda" if backend == "cuda" else "cpu", seed=7)
    indices = ops.mask_indices(PARAMETERS, proj_dim, seed=SEED).to(x.device)

    def check(answer):
        assert torch.equal(answer, x[:, indices])

    if row.startswith(GATHER):
        contender = Here(lambda: x.index_select(1, indices), x.device.type)
    else:
        contender = Here(lambda: ops.mask_project(x, proj_dim, seed=SEED, backend=backend), x.device.type)
    measure(
        contender,
        check=check,
        table=TABLE,
        row=row,
        column=f"D={proj_dim}",
        ours=row.startswith("pyattr"),
        work=BATCH * proj_dim,
        unit="values kept",
        bytes=8 * BATCH * proj_dim,
        note="",
        extra={"shape": {"B": BATCH, "P": PARAMETERS, "D": proj_dim}},
    )
