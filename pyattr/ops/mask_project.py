"""Projection onto randomly chosen coordinates."""

from typing import NamedTuple

import torch

from .. import backends
from ..backends import Backend
from ..reference import mask_project as reference
from ._arguments import check_integer, check_piece
from ._linear import register_pair
from ._projection import check_grads, check_matrix

MAX_COLUMNS = 2**62  # what the permutation takes


class Mask(NamedTuple):
    """Everything that defines a choice of coordinates, and its scale, but how many are kept."""

    seed: int
    stream: int
    column_offset: int
    num_columns: int
    scale: float


def mask_project(grads, proj_dim, *, seed=0, stream=0, column_offset=0, num_columns=None, scale=1.0, backend=None):
    """Keep ``proj_dim`` different, randomly chosen coordinates of each row.

    ``Y[b, j] = scale * grads[b, r_j - column_offset]``, zero where coordinate r_j lies outside the piece
    ``[column_offset, column_offset + P)``, with ``r = mask_indices(num_columns, proj_dim, seed, stream)``. In expectation over
    seeds ``E <Y, Y'> = scale^2 * D / n * <g, g'>``, with n = num_columns and g, g' the whole vectors;
    ``scale = (n / D) ** 0.5`` keeps inner products. Their variance is that of sampling without replacement,

        ``Var <Y, Y'> = scale^4 * D (n - D) / (n (n - 1)) * (sum_p g_p^2 g'_p^2 - <g, g'>^2 / n)``:

    small where gradients are spread over the coordinates, and large where a few hold most of the norm.

    Args:
        grads: [B, P] float16, bfloat16, float32 or float64; a torch tensor, NumPy array or CuPy array, any strides.
        proj_dim: D, 1 to ``num_columns``. The first D' of D coordinates are those of ``proj_dim = D'``.
        seed: word 0 of the Philox key, in [0, 2^32).
        stream: word 1 of the Philox key, in [0, 2^32); independent choices of one seed.
        column_offset: the coordinate that ``grads[:, 0]`` is. Pieces of a gradient, each with its own offset, add up exactly to
            the projection of the whole.
        num_columns: n, coordinates in all, of which the piece must be a part, at most 2^62; P by default, required with
            ``column_offset``.
        scale: multiplies the result; 0, or of a magnitude that float32 holds at full precision.
        backend: "reference", "cpu", "cuda", or None for the first usable. There is no Triton kernel: the work is one gather,
            which torch's own does at the speed of memory.

    Returns:
        [B, D] float32 (float64 for float64 input), of the kind and on the device of ``grads``: entries of ``grads`` times
        ``scale``, rounded twice at most (the scale and the product), so that the same bits come on every device and in every
        batch. NaN and inf reach the entries that keep them and no other. Differentiable in both modes and any order, also under
        torch.compile; the transpose puts each entry back in its place.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: 150 bytes per output column, and one copy of the result.

    Source: Hu et al., "GraSS: Scalable Data Attribution with Gradient Sparsification and Sparse Projection", 2025, for the
    random mask; Cochran, "Sampling Techniques", 1977, theorem 2.2, for the variance.
    """
    op = "mask_project"
    grads, restore = check_grads(op, grads)
    total = check_piece(op, grads, column_offset, num_columns, MAX_COLUMNS)
    proj_dim = _check_proj_dim(op, proj_dim, total)
    mask = check_matrix(op, Mask(seed, stream, column_offset, total, scale), total)
    return restore(_OP(grads, proj_dim, *mask, backend))


def mask_indices(num_columns, proj_dim, *, seed=0, stream=0):
    """The coordinates that :func:`mask_project` keeps, in the order of its outputs.

    ``r_j = pi(j)`` with pi a bijection of [0, num_columns), a function of (seed, stream, num_columns) alone: a Feistel network
    on the bits of j, keyed by Philox4x32-10, repeated until the result is below num_columns.

    Args:
        num_columns: n, 1 to 2^62.
        proj_dim: D, 1 to n.
        seed, stream: the key, each in [0, 2^32).

    Returns:
        [D] int64 tensor of different numbers in [0, n), on the CPU.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: 150 bytes per index.
    """
    op = "mask_indices"
    num_columns = check_integer(op, "num_columns", num_columns, 1, MAX_COLUMNS)
    proj_dim = _check_proj_dim(op, proj_dim, num_columns)
    key = [check_integer(op, name, word, 0, 2**32 - 1) for name, word in (("seed", seed), ("stream", stream))]
    return reference.mask_indices(num_columns, proj_dim, *key)


def _check_proj_dim(op, proj_dim, num_columns):
    proj_dim = check_integer(op, "proj_dim", proj_dim, 1, MAX_COLUMNS)
    if proj_dim > num_columns:
        raise ValueError(f"{op}: proj_dim must be at most num_columns = {num_columns}, got {proj_dim}")
    return proj_dim


def _gather(grads, proj_dim, seed, stream, column_offset, num_columns, scale):  # [B, P] -> [B, D]
    """Without a step that waits for the device, but the permutation's."""
    width = grads.shape[1]
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    if width == 0:
        return torch.zeros(grads.shape[0], proj_dim, dtype=dtype, device=grads.device)
    columns = reference.mask_indices(num_columns, proj_dim, seed, stream, grads.device) - column_offset
    out = grads.index_select(1, columns.clamp(0, width - 1)).to(dtype)
    # Zeros last: what was read from a place that only stands in for one outside may be infinite.
    return out.mul_(scale).masked_fill_((columns < 0) | (columns >= width), 0)


def _on(device):
    def reasons(grads, *_):
        return [] if grads.device.type == device else [f"grads is on {grads.device}, this backend needs {device}"]

    return reasons


def _no_cuda():
    return [] if torch.cuda.is_available() else ["torch sees no CUDA device"]


backends.register(
    "mask_project",
    [
        Backend("reference", reference.mask_project, backends.always, lambda *args: []),
        Backend("cpu", _gather, backends.always, _on("cpu")),
        Backend("cuda", _gather, _no_cuda, _on("cuda")),
    ],
)


def _project(grads, proj_dim, *mask_and_backend):
    *mask, backend = mask_and_backend
    return backends.choose("mask_project", backend, grads, proj_dim, *mask).run(grads, proj_dim, *mask)


def _transpose(coefficients, width, *mask_and_backend):
    return reference.mask_project_transpose(coefficients, width, *mask_and_backend[:-1])


_OP, _ = register_pair("mask_project", _project, _transpose, Mask)
