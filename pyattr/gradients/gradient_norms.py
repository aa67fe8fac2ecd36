"""Norms of per-sample gradients, without keeping a gradient."""

import operator
from functools import partial

import torch
from torch import Tensor, nn

from .batch import Batch
from .blocks import Blocks
from .capture import Loss
from .per_sample import Sources
from .plan import Planner
from .project import GIB, split

SAFE = 1e-12, 1e12  # of a float32 norm: no square on the way to it was lost or too large


def gradient_norms(module: nn.Module, loss: Loss, batch, *, memory: int = 2 * GIB) -> Tensor:
    """The Euclidean norm of each sample's gradient, over all parameters together.

    ``||g_b||`` with ``g_b`` [P] the gradient of :func:`per_sample_gradients`. A few rows of a weight's gradient are formed at
    a time, squared and summed: exact, where the product of Gram matrices of activations and errors would lose the digits that
    cancel between positions. Costs what the gradients cost.

    Args:
        module, loss, batch: as in `per_sample_gradients`.
        memory: bytes, as in `project_gradients`.

    Returns:
        [B] float64, on the device of the parameters: squares are summed in float64, so that neither small nor large
        gradients are lost; NaN where a gradient holds one.

    Raises:
        TypeError, ValueError: as in `per_sample_gradients`, and for a ``memory`` too small for one sample.

    Extra memory: at most ``memory``.
    """
    try:
        operator.index(memory)
    except TypeError:
        raise TypeError(f"gradient_norms: memory must be an integer, got {type(memory).__name__}") from None
    batch = Batch.of(batch)
    planner = Planner(module, loss, batch)
    parts, start = [], 0
    while start < batch.size:
        passes = planner.memory(batch)
        size, block = split(
            planner.plan.slow, passes, planner.parameters, batch.size - start, memory, op="gradient_norms"
        )
        receiver = planner.run(batch[start : start + size], partial(_Squares, planner.parameters, size, block))
        parts.append(receiver.out.sqrt())
        start += size
    return torch.cat(parts)


class _Squares:
    """Sums the squares of each gradient when it comes."""

    def __init__(self, parameters: dict[str, nn.Parameter], batch_size: int, block: int):
        self.parameters, self.blocks = parameters, Blocks(block)
        first = next(iter(parameters.values()))
        self.out = torch.zeros(batch_size, dtype=torch.float64, device=first.device)

    def from_rules(self, name: str, sources: Sources):
        if any(pairs for _, _, pairs in sources) and self.parameters[name].numel():
            for _, grads in self.blocks.of(self.parameters[name], sources, len(self.out)):
                self._add(grads)

    def from_tensor(self, name: str, grads: Tensor):
        self._add(grads)

    def _add(self, grads: Tensor):
        flat = grads.reshape(len(self.out), -1)
        norms = torch.linalg.vector_norm(flat, dim=1)  # three times as fast as in float64
        if not ((norms > SAFE[0]) & (norms < SAFE[1])).all():
            norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
        self.out += norms.double().square().to(self.out.device)
