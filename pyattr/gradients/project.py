"""Per-sample gradients streamed into a random projection, layer by layer, never all in memory."""

import operator
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn

from ..ops import rademacher_project
from ..ops._layer_projection import KINDS, Projector, piece
from ..ops._layers import Layer, takes_sketches
from ..reference.multisketch_project import WIDTH
from .batch import Batch
from .blocks import COPIES, Blocks
from .capture import Loss
from .per_sample import Sources, result_dtype
from .plan import Planner

TRANSIENTS = 2  # of a layer's largest input or error: what a rule makes of them on the way to a gradient
PART_SUMS = 4 << 17  # bytes of the sums that a sketch of a large layer keeps apart, per sample
GIB = 1 << 30


def project_gradients(
    module: nn.Module,
    loss: Loss,
    batch,
    proj_dim: int,
    *,
    kind: str = "rademacher",
    nonzeros: int = 1,
    seed: int = 0,
    memory: int = 2 * GIB,
) -> Tensor:
    """Random projections of per-sample gradients, computed layer by layer, no gradient ever whole in memory.

    ``phi_b = M g_b`` with ``g_b`` [P] the flat gradient of sample b (`per_sample_gradients`, each parameter flattened
    row by row, in ``named_parameters()`` order) and M [D, P] the matrix of `pyattr.ops.rademacher_project`,
    `gaussian_project`, `sparse_project` or `multisketch_project`, unscaled: ``E <phi, phi'>`` is ``<g, g'>`` times D, for
    "sparse" times ``nonzeros``, with the variance stated there. A loss [B, T] is averaged over T first.
    Dense kinds form a few rows of a weight's gradient at a time. "sparse" and "multisketch" add the gradients of linear
    layers and convolutions to the sketch straight from activations and errors, on the CPU in registers and caches.

    Args:
        module, loss, batch: as in `per_sample_gradients`.
        proj_dim: D, from 1 (``nonzeros`` for "sparse") to the largest of the projection.
        kind: "rademacher" (entries +-1), "gaussian" (standard normal), "sparse" (``nonzeros`` entries +-1 in each
            column) or "multisketch" (sparse to 2^20 entries, then signs).
        nonzeros: entries of a column, 1 to 8, for "sparse".
        seed: of the matrix, in [0, 2^32).
        memory: bytes that the computation may take beside the model, the batch and the result. Samples are split into
            sub-batches and weights into blocks of rows to stay within it; the result is the same to rounding. An
            estimate from the two passes of two samples; workspaces of the libraries come on top.

    Returns:
        [B, D] float32 (float64 for a model with float64 parameters), on the device of the parameters.

    Raises:
        TypeError, ValueError: as in `per_sample_gradients`, and for a ``memory`` too small for one sample.

    Extra memory: at most ``memory``.

    Source: Park et al., "TRAK: Attributing Model Behavior at Scale" (2023), section 3.2, for the projected gradients.
    """
    _check("project_gradients", kind, proj_dim=proj_dim, nonzeros=nonzeros, seed=seed, memory=memory)
    if not 1 <= nonzeros <= 8 or (nonzeros > 1 and kind != "sparse"):
        raise ValueError(
            f'project_gradients: nonzeros must lie in [1, 8], and be 1 unless kind is "sparse", got {nonzeros} for {kind!r}'
        )
    if kind == "sparse" and proj_dim < nonzeros:
        raise ValueError(f"project_gradients: proj_dim must be at least nonzeros, {nonzeros}, got {proj_dim}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"project_gradients: seed must lie in [0, 2^32), got {seed}")
    batch = Batch.of(batch)
    planner = Planner(module, loss, batch)
    first = "sparse" if kind == "multisketch" else kind
    width = WIDTH if kind == "multisketch" else proj_dim
    projector = Projector(width, False, first, nonzeros, seed, 0, 0, 1.0)
    parts, start = [], 0
    while start < batch.size:
        passes = planner.memory(batch)
        size, block = split(
            planner.plan.slow, passes, planner.parameters, batch.size - start, memory, _held(kind, proj_dim)
        )
        make_receiver = partial(_Projected, planner.parameters, size, block, projector)
        out = planner.run(batch[start : start + size], make_receiver).out
        parts.append(rademacher_project(out, proj_dim, seed=seed) if kind == "multisketch" else out)
        start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def least_memory(module: nn.Module, loss: Loss, batch, proj_dim: int, kind: str = "rademacher") -> int:
    """The least ``memory`` that `project_gradients` accepts: what one sample takes.

    ``a + b``: a for what the two passes keep of one sample and its sums, b for one row of the widest gradient and copies of it.

    Args:
        module, loss, batch, proj_dim, kind: as in `project_gradients`.

    Returns:
        Bytes.

    Raises:
        TypeError, ValueError: as in `project_gradients`.

    Extra memory: what two samples take, the first time.
    """
    _check("least_memory", kind, proj_dim=proj_dim)
    batch = Batch.of(batch)
    planner = Planner(module, loss, batch)
    return sum(_needs(planner.plan.slow, planner.memory(batch), planner.parameters, _held(kind, proj_dim)))


def _check(op: str, kind: str, **integers):
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, value in integers.items():
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}") from None
    if integers["proj_dim"] < 1:
        raise ValueError(f"{op}: proj_dim must be at least 1, got {integers['proj_dim']}")


def _held(kind: str, proj_dim: int) -> int:
    """Bytes for one sample beside the passes: a projected piece, the sums of a sketch's parts, or those between two stages."""
    return {"sparse": PART_SUMS, "multisketch": 4 * WIDTH}.get(kind, 0) + 4 * proj_dim


def split(
    slow: Collection[str],
    passes: tuple[int, int],
    parameters: dict[str, Tensor],
    batch_size: int,
    memory: int,
    held: int = 0,
    op: str = "project_gradients",
) -> tuple[int, int]:
    """Samples in a sub-batch, and bytes for a block of gradients, so that both fit into the budget.

    Half of the budget goes to the forward and backward pass, unless one sample needs more.

    Args:
        slow: the parameters for torch.func.
        passes: see `Planner.memory`.
        parameters, batch_size, memory: what there is.
        held: bytes for one sample beside the passes.
        op: for the error message.

    Raises:
        ValueError: if one sample and one row of a weight do not fit.
    """
    per_sample, row = _needs(slow, passes, parameters, held)
    if per_sample + row > memory:
        raise ValueError(f"{op}: memory must be at least {per_sample + row} bytes for one sample, got {memory}")
    size = min(batch_size, max(1, memory // 2 // max(1, per_sample)))
    size = -(-batch_size // -(-batch_size // size))  # equal sub-batches
    while size > 1 and size * (per_sample + row) > memory:
        size -= 1
    return size, memory - size * per_sample


def _needs(
    slow: Collection[str], passes: tuple[int, int], parameters: dict[str, Tensor], held: int = 0
) -> tuple[int, int]:
    """Bytes for one sample: for the two passes, and for one row of the widest gradient."""
    size_of = {name: p.numel() * result_dtype(p).itemsize for name, p in parameters.items()}
    peak, largest = passes
    per_sample = peak + TRANSIENTS * largest
    if slow:  # torch.func: its own activations and errors, the gradients and a copy of them in one piece
        per_sample = max(per_sample, 2 * peak + 2 * sum(size_of[name] for name in slow))
    row = max((size // len(parameters[name]) for name, size in size_of.items() if size and name not in slow), default=0)
    return per_sample + held, COPIES * row


class _Projected:
    """Projects each gradient when it comes, at the place of its parameter in the flat gradient."""

    def __init__(self, parameters: dict[str, nn.Parameter], batch_size: int, block: int, projector: Projector):
        self.parameters, self.offsets, end = parameters, {}, 0
        for name, parameter in self.parameters.items():
            self.offsets[name] = end
            end += parameter.numel()
        self.blocks, self.projector = Blocks(block), projector
        first = next(iter(self.parameters.values()))
        dtypes = [result_dtype(parameter) for parameter in self.parameters.values()]
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.out = torch.zeros(batch_size, projector.proj_dim, dtype=dtype, device=first.device)

    def from_rules(self, name: str, sources: Sources):
        if not any(pairs for _, _, pairs in sources) or not self.parameters[name].numel():
            return
        if self.projector.kind == "sparse" and self._sketched(name, sources):
            return
        for start, grads in self.blocks.of(self.parameters[name], sources, self.out.shape[0]):
            self._add(grads, self.offsets[name] + start)

    def _sketched(self, name: str, sources: Sources) -> bool:
        """Add a weight's gradient to the sums without forming it, if all of its layers allow that."""
        if any(local != "weight" or site.rule.as_layer is None for site, local, _ in sources):
            return False
        layers = [site.rule.as_layer(site.module, *pair) for site, _, pairs in sources for pair in pairs]
        if not takes_sketches(self.out) or any(layer.unfit() for layer in layers):
            return False
        for layer in layers:
            self._sketch(layer, self.offsets[name])
        return True

    def _sketch(self, layer: Layer, offset: int):
        key = self.projector
        layer.sketch(self.out, key.seed, key.stream, offset, key.nonzeros)

    def from_tensor(self, name: str, grads: Tensor):
        self._add(grads.to(result_dtype(grads)), self.offsets[name])

    def _add(self, grads: Tensor, offset: int):
        flat = grads.reshape(self.out.shape[0], -1)
        if self.projector.kind == "sparse" and takes_sketches(self.out):
            # Straight to the sums, as the weight of one output: a projection of its own would fill [B, D] for a few columns.
            layer = Layer.linear(flat[:, None], flat.new_ones(()).expand(len(flat), 1, 1))
            if not layer.unfit():
                return self._sketch(layer, offset)
        self.out += piece(self.projector, flat, offset, None).to(self.out.device)
