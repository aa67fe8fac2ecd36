"""A U-Net's output with K = 16 tangents: dual_forward beside torch's two ways, which need a changed copy of the model.

``python -m bench.bench_dual_forward ROW COLUMN`` runs one contender twice and prints the MiB that the second run took at most.
"""

import copy
import ctypes
import functools
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap

from bench.contenders import Here
from bench.figures import PEAK, Goal, lead
from bench.memory import peak_mib, print_peak
from pyattr.jvp import dual_forward

TABLE, SEED, TANGENTS, TIMESTEP = "dual_forward", 5, 16, 400
# Few channels at full resolution and many below; and many at full resolution: what is gained depends on that.
NARROW, WIDE = (f"U-Net of {channels}, 3x32x32, B=1, K=16" for channels in ("32 to 256 channels", "64 to 128 channels"))


class ContiguousGroupNorm(nn.GroupNorm):
    """Torch's, on the inputs of which it has a forward derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.contiguous(), self.num_groups, self.weight, self.bias, self.eps)


CASES = {
    # 14.2 million parameters, attention at 16 x 16
    NARROW: dict(
        block_out_channels=(32, 64, 128, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ),
    # 6.5 million parameters, attention at 16 x 16
    WIDE: dict(
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
}


@functools.cache
def unet(column: str) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(SEED)
    return UNet2DModel(sample_size=32, attention_head_dim=32, layers_per_block=2, **CASES[column]).eval()


@functools.cache
def copied(column: str) -> nn.Module:
    """A copy on which torch's forward mode runs: attention spelled out, and no group norm of strided views."""
    from diffusers.models.attention_processor import AttnProcessor

    model = copy.deepcopy(unet(column))
    for part in model.modules():
        if hasattr(part, "set_processor"):
            part.set_processor(AttnProcessor())
        if type(part) is nn.GroupNorm:
            part.__class__ = ContiguousGroupNorm
    return model


@functools.cache
def inputs() -> tuple[Tensor, Tensor]:  # [1, 3, 32, 32], [K, 1, 3, 32, 32]
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(1, 3, 32, 32, generator=generator), torch.randn(TANGENTS, 1, 3, 32, 32, generator=generator)


def ours(column: str, x: Tensor, x_dot: Tensor):
    return dual_forward(unet(column), x, x_dot, TIMESTEP)


def by_vmap(column: str, x: Tensor, x_dot: Tensor):
    model = copied(column)
    with torch.no_grad():
        return vmap(lambda t: jvp(lambda x: model(x, TIMESTEP).sample, (x,), (t,)), out_dims=(None, 0))(x_dot)


def by_copies(column: str, x: Tensor, x_dot: Tensor):
    """As encoded ensembles were published: each tangent with a copy of the primal of its own, in one batch."""
    with torch.no_grad(), forward_ad.dual_level():
        batch = forward_ad.make_dual(x.expand(len(x_dot), -1, -1, -1).contiguous(), x_dot[:, 0].contiguous())
        y, y_dot = forward_ad.unpack_dual(copied(column)(batch, TIMESTEP).sample)
    return y[:1], y_dot[:, None]


OURS = "pyattr dual_forward"
VMAP = "torch.func vmap(jvp), copy of the model"
COPIES = "torch forward_ad on K copies of x, copy of the model"
ROWS = {OURS: ours, VMAP: by_vmap, COPIES: by_copies}


def _memory(column: str):
    """How many times as much either of the others takes at its peak."""

    def measured(rate):
        mine, *theirs = (rate(PEAK + row, column) for row in (OURS, VMAP, COPIES))
        return min(theirs) / mine if mine and all(theirs) else None

    return measured


GOALS = [
    goal
    for column in CASES
    for goal in (
        Goal(TABLE, f"{column}: at least twice vmap(torch.func.jvp)", lead(OURS, VMAP, column), 2),
        Goal(TABLE, f"{column}: at least 2.5 times dual numbers on K copies", lead(OURS, COPIES, column), 2.5),
        Goal(TABLE, f"{column}: the others take at least twice its peak memory", _memory(column), 2),
    )
]


@functools.cache
def exact(column: str) -> tuple[Tensor, Tensor]:
    """The first and last tangents in float64."""
    model = copy.deepcopy(copied(column)).double()
    for part in model.modules():
        if hasattr(part, "upcast_softmax"):
            part.upcast_softmax = part.upcast_attention = False
    x, x_dot = (tensor.double() for tensor in inputs())
    with torch.no_grad():
        results = [jvp(lambda x: model(x, TIMESTEP).sample, (x,), (x_dot[k],)) for k in (0, -1)]
    return results[0][0], torch.stack([y_dot for _, y_dot in results])


def check(answer, column: str):
    for got, want in zip((answer[0], answer[1][[0, -1]]), exact(column), strict=True):
        error = ((got - want).norm() / want.norm()).item()
        assert error < 1e-5, f"differs from float64 by {error:.2g} of its norm"


@pytest.mark.parametrize("column", CASES)
@pytest.mark.parametrize("row", ROWS)
def test_dual_forward(row, column, measure):
    copied(column)
    measure(
        Here(lambda: ROWS[row](column, *inputs())),
        check=lambda answer: check(answer, column),
        table=TABLE,
        row=row,
        column=column,
        ours=row == OURS,
        work=TANGENTS,
        unit="tangents through the network",
        bytes=4 * sum(parameter.numel() for parameter in unet(column).parameters()),
        extra=peak_mib("bench_dual_forward", row, column),
    )


def main(row: str, column: str):
    (x, x_dot), _ = inputs(), copied(column)
    # Tensors from the system and back to it (M_MMAP_THRESHOLD), so that holes in malloc's heap are nobody's memory.
    ctypes.CDLL(None).mallopt(-3, 1 << 18)
    ROWS[row](column, x, x_dot)  # what a first call loads, compiles and keeps is not what a call takes
    ctypes.CDLL(None).malloc_trim(0)  # nor is free memory, which would hide what the next call asks for
    print_peak(lambda: ROWS[row](column, x, x_dot))


if __name__ == "__main__":
    main(*sys.argv[1:])
