"""patch_mean of one query beside convolutions, softmax and a matmul in torch, in pairs of patches per second."""

import pytest
import torch

from bench.contenders import Here
from bench.patches import Case, bank, convolution_mean, query
from pyattr import ops, testing

TABLE = "patch_mean"
COLUMNS = {
    "N=1000, 32x32, p=7": Case(1000, 32, 7, 0),
    "N=1000, 32x32, p=15": Case(1000, 32, 15, 0),
}
CONVOLUTION, POSITIONS = "torch conv2d, softmax, matmul", 64
OURS = [f"pyattr {name}" for name in testing.usable_backends("patch_mean") if name != "reference"]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", [*OURS, CONVOLUTION])
def test_patch_mean(row, column, measure):
    case = COLUMNS[column]
    mine = row.startswith("pyattr")
    device = testing.device_of(row.split()[-1]) if mine else "cpu"
    x, images = query(case).to(device), bank(case.images + 1, case.size)[:-1].to(device)
    options = case.options | {"border": "inside"}
    inside = case.size - case.patch_size + 1
    theirs = convolution_mean(case, positions=POSITIONS)
    call = (lambda: ops.patch_mean(x, images, backend=row.split()[-1], **options)) if mine else theirs

    def check(answer):
        found = answer.mean[0].flatten(1)[:, :POSITIONS].cpu() if mine else answer
        torch.testing.assert_close(found, theirs(), rtol=0, atol=2e-3)

    measure(
        Here(call, device),
        check=check,
        table=TABLE,
        row=row,
        column=column,
        ours=mine,
        work=case.images * inside**4 * (1.0 if mine else POSITIONS / inside**2),
        unit="pairs of patches",
        bytes=case.images * case.channels * case.size**2,
        note="" if mine else f"timed on {POSITIONS} positions of the query",
        rounds=5 if mine else 2,
        extra={"shape": vars(case)},
    )
