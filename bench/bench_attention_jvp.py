"""attention_jvp beside torch's own ways to the same tangents, in multiply-adds that the tangents need (4 products each).

All rows are given contiguous views [B, L, H, E] transposed to [B, H, L, E], as a network hands them on.
"""

from dataclasses import dataclass

import pytest
import torch

from bench.contenders import Here
from pyattr import ops, testing

TABLE = "attention_jvp"
SEED = 0


@dataclass(frozen=True)
class Case:
    """Self-attention over ``length`` positions, with tangents of queries, keys and values."""

    heads: int
    length: int
    width: int  # of a head
    tangents: int
    batch: int = 1

    def arrays(self, device: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.batch, self.length, self.heads, self.width)
        return [
            torch.randn(*lead, *shape, generator=generator).to(device).transpose(-3, -2)
            for lead in ((), (self.tangents,))
            for _ in range(3)
        ]

    @property
    def multiply_adds(self) -> int:
        return 4 * self.tangents * self.batch * self.heads * self.length**2 * self.width


CASES = {
    "L=256, E=256, 1 head, K=20": Case(1, 256, 256, 20),  # the CIFAR-10 U-Net of DDPM at 16 x 16
    "L=256, E=64, 8 heads, K=20": Case(8, 256, 64, 20),
    "L=64, E=64, 8 heads, K=20": Case(8, 64, 64, 20),
    "L=1024, E=40, 8 heads, K=4": Case(8, 1024, 40, 4),
}


def attention(query, key, value):
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


def vmap_of_jvp(query, key, value, *tangents):
    def along(*dots):
        return torch.func.jvp(attention, (query, key, value), dots)

    return torch.func.vmap(along, out_dims=(None, 0))(*tangents)


def one_tangent_at_a_time(query, key, value, *tangents):
    results = [torch.func.jvp(attention, (query, key, value), dots) for dots in zip(*tangents, strict=True)]
    return results[0][0], torch.stack([y_dot for _, y_dot in results])


def products(query, key, value, query_dot, key_dot, value_dot):
    """The formula in matmuls, the attention once."""
    scale = query.shape[-1] ** -0.5
    weights = (query @ key.mT * scale).softmax(-1)
    scores_dot = (query_dot @ key.mT + query @ key_dot.mT) * scale
    weights_dot = weights * (scores_dot - (weights * scores_dot).sum(-1, keepdim=True))
    return weights @ value, weights_dot @ value + weights @ value_dot


THEIRS = {
    "torch vmap(jvp)": vmap_of_jvp,
    "torch jvp, one tangent at a time": one_tangent_at_a_time,
    "torch matmuls, all tangents at once": products,
}
OURS = [f"pyattr {name}" for name in testing.usable_backends("attention_jvp") if name != "reference"]


@pytest.mark.parametrize("column", CASES)
@pytest.mark.parametrize("row", [*OURS, *THEIRS])
def test_attention_jvp(row, column, measure):
    case, mine = CASES[column], row in OURS
    backend = row.split()[-1]
    device = testing.device_of(backend) if mine else "cuda" if "pyattr cuda" in OURS else "cpu"
    arrays = case.arrays(device)

    def call():
        with torch.no_grad():
            return ops.attention_jvp(*arrays, backend=backend) if mine else THEIRS[row](*arrays)

    def check(answer):
        exact = ops.attention_jvp(*(a.double() for a in arrays), backend="reference")
        for found, wanted in zip(answer, exact, strict=True):
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()

    floats = sum(a.numel() for a in arrays) + arrays[2].numel() + arrays[5].numel()
    measure(
        Here(call, device),
        check=check,
        table=TABLE,
        row=row,
        column=column,
        ours=mine,
        work=case.multiply_adds,
        unit="multiply-adds",
        bytes=4 * floats,
        ceiling="fmas_per_s",
        extra={"shape": vars(case)},
    )
