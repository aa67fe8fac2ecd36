"""Two-sided projection of a layer's gradients beside the ways to write it in torch, in multiply-adds per second.

``python -m bench.bench_kron_grad_project ROW COLUMN`` runs one contender once and prints the MiB that it took at most.
"""

import functools
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from bench import machine
from bench.contenders import Here
from bench.figures import Goal, lead
from bench.memory import peak_mib, print_peak
from pyattr import ops
from pyattr.ops import mask_indices, sign_matrix, sparse_project

TABLE, SEED, BATCH = "kron_grad_project", 3, 64


@dataclass(frozen=True)
class Setting:
    """A layer [out_channels, in_channels, kernel, kernel] on square maps of ``size`` (tokens: a 1 x ``size`` map)."""

    in_channels: int
    out_channels: int
    size: int
    factor_dims: tuple[int, int] = (64, 64)
    kernel: int = 3
    batch: int = BATCH
    device: str = "cpu"

    @property
    def is_convolution(self) -> bool:
        return self.kernel > 1

    @property
    def positions(self) -> int:
        return self.size * self.size if self.is_convolution else self.size

    @property
    def width(self) -> int:
        return self.in_channels * self.kernel**2

    @functools.cached_property
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations [B, C, H, W] or [B, T, I] and errors."""
        generator = torch.Generator().manual_seed(SEED)
        shapes = (
            [(self.batch, channels, self.size, self.size) for channels in (self.in_channels, self.out_channels)]
            if self.is_convolution
            else [(self.batch, self.size, channels) for channels in (self.in_channels, self.out_channels)]
        )
        return tuple(torch.randn(shape, generator=generator).to(self.device) for shape in shapes)

    @functools.cached_property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P_out [k_out, O], P_in [k_in, I]; torch's rows have them ready."""
        sizes = zip(self.factor_dims, (self.out_channels, self.width), (0, 1), strict=True)
        return tuple(sign_matrix(range(k), range(n), SEED, side).float().to(self.device) for k, n, side in sizes)

    @property
    def layer(self) -> dict:
        return {"kernel_size": self.kernel, "padding": self.kernel // 2} if self.is_convolution else {}

    def patches(self) -> torch.Tensor:  # [B, I, L]
        acts = self.data[0]
        return F.unfold(acts, self.kernel, padding=self.kernel // 2) if self.is_convolution else acts.mT

    def errs(self) -> torch.Tensor:  # [B, O, L]
        return self.data[1].flatten(2) if self.is_convolution else self.data[1].mT


def ours(setting, **options):
    return ops.kron_grad_project(*setting.data, setting.factor_dims, seed=SEED, **setting.layer, **options)


def form_then_project(setting):
    """Every sample's gradient [B, O, I] at once, as vmap(grad) leaves it."""
    p_out, p_in = setting.factors
    grads = setting.errs() @ setting.patches().mT
    return (p_out @ (grads.flatten(0, 1) @ p_in.T).unflatten(0, grads.shape[:2])).flatten(1)


def unfold_then_project(setting):
    """LoGra's order of the products, on patches that are copied out."""
    p_out, p_in = setting.factors
    return ((p_out @ setting.errs()) @ (p_in @ setting.patches()).mT).flatten(1)


def form_then_mask(setting):
    grads = setting.errs() @ setting.patches().mT
    rows, columns = (
        mask_indices(n, k, seed=SEED, stream=side)
        for side, (n, k) in enumerate(zip(grads.shape[1:], setting.factor_dims, strict=True))
    )
    kept = grads[:, rows][:, :, columns].flatten(1)
    return sparse_project(kept, SKETCH_DIM, seed=SEED)


SKETCH_DIM = 1024
OURS, FORM, UNFOLD = (
    "pyattr cpu",
    "torch: form the gradients, then project",
    "torch: copy the patches, project, multiply",
)
OUR_SKETCH, FORM_SKETCH = "pyattr cpu, mask and sketch", "torch: form the gradients, then mask; pyattr sketch"
ROWS = {
    OURS: functools.partial(ours, backend="cpu"),
    FORM: form_then_project,
    UNFOLD: unfold_then_project,
    OUR_SKETCH: functools.partial(ours, kind="mask", sketch_dim=SKETCH_DIM, backend="cpu"),
    FORM_SKETCH: form_then_mask,
}
SETTINGS = {
    "CelebA U-Net convolution 1024 to 512, 8 x 8": Setting(1024, 512, 8),
    "convolution 128 to 128, 32 x 32": Setting(128, 128, 32, factor_dims=(32, 32)),
    "linear 1280 to 1280, 256 tokens": Setting(1280, 1280, 256, kernel=1),
}


def check(setting: Setting, row: str):
    """First and last sample against the definition."""
    options = {"kind": "mask", "sketch_dim": SKETCH_DIM} if row in (OUR_SKETCH, FORM_SKETCH) else {}
    ends = [torch.stack([tensor[0], tensor[-1]]) for tensor in setting.data]
    wanted = ops.kron_grad_project(
        *(end.double() for end in ends), setting.factor_dims, seed=SEED, **setting.layer, **options, backend="reference"
    )

    def run(answer):
        error = ((answer[[0, -1]] - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
        assert error < 1e-5, f"differs from the definition by {error:.2g} of its norm"

    return run


def main(row: str, column: str):
    setting = SETTINGS[column]
    assert setting.data and (row in (OURS, OUR_SKETCH) or setting.factors)
    # What the library loads and keeps at its first products is no contender's.
    F.conv2d(torch.randn(2, 8, 8, 8), torch.randn(8, 8, 3, 3)), torch.randn(2, 64, 64) @ torch.randn(2, 64, 64)
    print_peak(lambda: ROWS[row](setting))


GOALS = [
    Goal(TABLE, f"{column}: at least 1.5 times {text}", lead(above, below, column), 1.5)
    for column in SETTINGS
    for above, below, text in (
        (OURS, FORM, "forming the gradients, then projecting"),
        (OUR_SKETCH, FORM_SKETCH, "forming the gradients, then masking and sketching"),
    )
]


@pytest.mark.parametrize("column", SETTINGS)
@pytest.mark.parametrize("row", ROWS)
def test_kron_grad_project(row, column, measure, leave_out):
    setting = SETTINGS[column]
    if row == UNFOLD and not setting.is_convolution:
        pytest.skip("a linear layer has no patches")
    formed = 4 * setting.batch * setting.out_channels * setting.width
    if row in (FORM, FORM_SKETCH) and 2 * formed > machine.available_bytes():
        leave_out(TABLE, row, column, f"the formed gradients take {formed / 2**30:.1f} GiB, more than is free")
    k_out, k_in = setting.factor_dims
    per_position = setting.out_channels * k_out + setting.width * k_in + k_out * k_in
    acts, errs = setting.data
    measure(
        Here(lambda: ROWS[row](setting)),
        check=check(setting, row),
        table=TABLE,
        row=row,
        column=column,
        ours=row.startswith("pyattr"),
        kind="mask and sketch" if row in (OUR_SKETCH, FORM_SKETCH) else "dense factors",
        work=setting.batch * setting.positions * per_position,
        unit="multiply-adds of the two-sided product",
        bytes=4 * (acts.numel() + errs.numel() + setting.batch * k_out * k_in),
        note=""
        if row in (OURS, OUR_SKETCH)
        else "factors in memory, making them not counted"
        if "mask" not in row
        else "",
        rounds=7,
        extra=peak_mib("bench_kron_grad_project", row, column),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
