"""group_norm_silu_jvp at a U-Net's shapes beside torch's forward mode, its formula in torch, and a copy; in bytes per second.

Bytes are what must be moved at least: x and its tangents read once, y and its tangents written once.
"""

import functools
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional

from bench.contenders import Here
from bench.figures import Goal, lead
from pyattr import ops, testing

TABLE, GROUPS = "group_norm_silu_jvp", 32


class Case(NamedTuple):
    """One column of the table: float32, 32 groups."""

    samples: int
    channels: int
    side: int
    tangents: int

    @property
    def bytes(self) -> int:
        return 2 * 4 * (self.tangents + 1) * self.samples * self.channels * self.side**2


COLUMNS = {
    f"B={case.samples}, {case.channels}x{case.side}x{case.side}, K={case.tangents}": case
    for case in (Case(1, 128, 32, 16), Case(1, 256, 16, 16), Case(4, 256, 32, 16))
}
FORWARD, FORMULA, COPY = "torch vmap(jvp)", "torch, the formula by hand", "torch clone of x and its tangents"
OURS = [f"pyattr {name}" for name in testing.usable_backends("group_norm_silu_jvp") if name != "reference"]


@functools.cache
def inputs(case: Case, device: str) -> tuple[torch.Tensor, ...]:
    """x [B, C, H, W], x_dot [K, B, C, H, W], weight and bias [C]."""
    generator = torch.Generator().manual_seed(5)
    shape = (case.samples, case.channels, case.side, case.side)
    arrays = [torch.randn(size, generator=generator) for size in (shape, (case.tangents, *shape))]
    arrays += [1 + torch.randn(case.channels, generator=generator) / 4, torch.randn(case.channels, generator=generator)]
    return tuple(array.to(device) for array in arrays)


def forward_mode(x, x_dot, weight, bias):
    """The plain operators under torch.func."""

    def module(s):
        return functional.silu(functional.group_norm(s, GROUPS, weight, bias))

    return module(x), torch.func.vmap(lambda v: torch.func.jvp(module, (x,), (v,))[1])(x_dot)


def formula(x, x_dot, weight, bias):
    """The primal once, then the tangents' formula, an operator at a time."""
    shape = (GROUPS, x.shape[1] // GROUPS)
    s, t = x.unflatten(1, shape), x_dot.unflatten(2, shape)
    within = (-3, -2, -1)
    centred = s - s.mean(within, keepdim=True)
    inverse = (centred.square().mean(within, keepdim=True) + 1e-5).rsqrt()
    xhat = centred * inverse
    z = xhat.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]
    share = torch.sigmoid(z)
    slope = (share * (1 + z * (1 - share)) * weight[:, None, None]).unflatten(1, shape) * inverse
    along = (xhat * t).mean(within, keepdim=True)
    y_dot = slope * (t - t.mean(within, keepdim=True) - xhat * along)
    return z * share, y_dot.flatten(2, 3)


def _times(column, least):
    """Times the rate of torch's forward mode."""
    return Goal(TABLE, f"{column}: at least {least} times {FORWARD}", lead("pyattr cpu", FORWARD, column), least)


def _of_memory(column, share):
    def measured(rate):
        ours, memory = rate("pyattr cpu", column), rate("ceiling", "ram_read_bytes_per_s")
        return ours / memory if ours and memory else None

    return Goal(TABLE, f"{column}: at least {share:.0%} of the bandwidth of reading memory", measured, share)


GOALS = [goal for column in COLUMNS for goal in (_times(column, 5), _of_memory(column, 0.6))]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", [*OURS, FORWARD, FORMULA, COPY])
def test_group_norm_silu_jvp(row, column, measure):
    case = COLUMNS[column]
    mine = row.startswith("pyattr")
    backend = row.split()[-1]
    device = testing.device_of(backend) if mine else "cpu"
    x, x_dot, weight, bias = given = inputs(case, device)

    def call():
        if mine:
            return ops.group_norm_silu_jvp(x, x_dot, GROUPS, weight, bias, backend=backend)[:2]
        if row == COPY:
            return x.clone(), x_dot.clone()
        return (forward_mode if row == FORWARD else formula)(*given)

    def check(answer):
        wanted = (x, x_dot[:2]) if row == COPY else formula(*(a.double() for a in (x, x_dot[:2], weight, bias)))
        for found, expected in zip((answer[0], answer[1][:2]), wanted, strict=True):
            assert (found.double() - expected).norm() <= 1e-5 * expected.norm()

    measure(
        Here(call, device),
        check=check,
        table=TABLE,
        row=row,
        column=column,
        ours=mine,
        work=float(case.bytes),
        unit="bytes",
        bytes=case.bytes,
        note="",
        extra={"shape": case._asdict()},
    )
