"""The trace of a vector field's Jacobian: exactly, one product for each direction, or estimated along random ones."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..jvp import dual_forward
from .noise import TRACES, noise

Field = Callable[[Tensor], Tensor]  # [B, *shape] -> [B, *shape]


class Directions:
    """Along which products are taken, a few at a time.

    Args:
        shape: of an image.
        probes: [M, B, *shape] random directions, whose outer product has the identity as its mean; None: every axis.
        at_a_time: K.
    """

    def __init__(self, shape: torch.Size, probes: Tensor | None, at_a_time: int):
        self.shape, self.probes, self.at_a_time = shape, probes, at_a_time

    def __len__(self) -> int:
        return self.shape.numel() if self.probes is None else len(self.probes)

    def parts(self, like: Tensor) -> Iterator[Tensor]:
        """All of them, [K, B, *shape] in the dtype and on the device of ``like`` [B, *shape]."""
        for start in range(0, len(self), self.at_a_time):
            stop = min(start + self.at_a_time, len(self))
            if self.probes is None:
                axes = torch.zeros(stop - start, self.shape.numel(), dtype=like.dtype, device=like.device)
                axes[torch.arange(stop - start), torch.arange(start, stop)] = 1
                yield axes.view(-1, 1, *self.shape).expand(-1, len(like), *self.shape)
            else:
                yield self.probes[start:stop].to(like)

    @property
    def weight(self) -> float:
        """Of a direction's product in the sum."""
        return 1.0 if self.probes is None else 1.0 / len(self.probes)


def value_and_divergence(field: Field, x: Tensor, directions: Directions) -> tuple[Tensor, Tensor]:
    """The field, [B, *shape], and its divergence, [B] float64, without a graph.

    Extra memory: a forward pass on (K + 1) B images.
    """
    value, total = None, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for part in directions.parts(x):
        value, change = dual_forward(field, x, part.contiguous())
        total += _products(part, change)
    return value, total * directions.weight


def divergence_with_graph(field: Field, x: Tensor, directions: Directions) -> Tensor:
    """The divergence, [B] float64, differentiable in x and in what the field computes with.

    Extra memory: what a backward pass needs of a forward pass with K tangents; products are made again on the way back.
    """
    parts = [
        checkpoint(_along, field, x, part, use_reentrant=False, preserve_rng_state=False)
        for part in directions.parts(x)
    ]
    return torch.stack(parts).sum(0) * directions.weight


def random_directions(kind: str, count: int, shape: torch.Size, seed: int, ids: Tensor) -> Tensor:
    """Probes of Hutchinson's estimate: [count, B, *shape] float32, a function of (seed, id, number of the probe).

    Args:
        kind: "gaussian", or "rademacher": the signs of those.
    """
    normal = noise(shape, seed=seed, ids=ids, timesteps=0, draws=torch.arange(count)[:, None], purpose=TRACES)
    return normal if kind == "gaussian" else torch.where(normal < 0, -1.0, 1.0)


def _along(field: Field, x: Tensor, directions: Tensor) -> Tensor:
    """``sum_k v_k . J v_k``, [B], one forward derivative for all K."""

    def derivative(direction: Tensor) -> Tensor:
        return torch.func.jvp(field, (x,), (direction,))[1]

    return _products(directions, torch.func.vmap(derivative)(directions))


def _products(directions: Tensor, changes: Tensor) -> Tensor:  # [K, B, *shape] twice -> [B] float64
    return (directions * changes).flatten(2).sum((0, 2), dtype=torch.float64)
