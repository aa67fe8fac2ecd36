"""Projection of a linear layer's per-sample gradients, which are never in memory."""

from ..reference.linear_grad_project import linear_grad_project as definition
from ._layer_projection import LayerProjection, Projector, check_pair
from ._layers import Layer


def _by_definition(acts, errs, geometry, projector):
    return definition(
        acts, errs, *projector[:2], projector.kind, projector.nonzeros, projector.seed, projector.stream,
        projector.column_offset, projector.scale,
    )  # fmt: skip


_PROJECT = LayerProjection("linear_grad_project", _by_definition, Layer.linear)


def linear_grad_project(
    acts, errs, proj_dim, *, bias=False, kind="rademacher", nonzeros=1, seed=0, stream=0, column_offset=0,
    num_columns=None, scale=1.0, backend=None,
):  # fmt: skip
    """Project the per-sample gradients of a linear layer ``y = x W^T + b`` without forming them.

    ``Y_b = scale * M vec(sum_t errs[b, t] acts[b, t]^T)``, with M the matrix that `rademacher_project`, `gaussian_project`,
    `sparse_project` or `multisketch_project` has for these parameters: the projection of the flat gradient, columns row-major
    [O, I], those of the bias (``sum_t errs[b, t]``) behind them.

    Args:
        acts: [B, T, I] float16, bfloat16, float32 or float64 (reference only), the layer's input at T positions or timesteps of
            each sample; [B, I] for one. A torch tensor, NumPy array or CuPy array, any strides.
        errs: [B, T, O] or [B, O], likewise: gradients of the loss with respect to the layer's output.
        proj_dim: D.
        bias: whether O columns for the bias follow.
        kind: "rademacher", "gaussian", "sparse" or "multisketch".
        nonzeros: entries of a column, for "sparse".
        seed, stream: of the matrix, each in [0, 2^32).
        column_offset: the matrix's column for the first entry of the weight.
        num_columns: columns of the matrix in all; O (I + bias) by default, required with ``column_offset`` by "sparse" and
            "multisketch".
        scale: multiplies the result.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        [B, D] float32 (float64 for float64 input), of the kind and on the device of ``acts``; sums are in float32,
        expectation and variance those of the projection. On the CPU the bits for "sparse" do not depend on the threads or
        the batch; elsewhere a library's matmul forms the tiles, whose bits may.

    Raises:
        TypeError, ValueError: an argument is not as above, or requires a gradient (the op has none).
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: at most 64 MB and B * D * 4 bytes, whatever the layer is, or the float32 copy of one sample's 16-bit inputs
    where that is more. On the CPU, "sparse" and "multisketch" keep their tiles in registers and caches: 16 MB of sums, and
    per thread 512 KB of patches and at most 6 MB of errors and tile. Other kinds form 32 MB of rows at a time. The reference
    forms the whole gradient in float64, and its patches.

    Source: Goodfellow, "Efficient Per-Example Gradient Computations", 2015, equation 5, for the gradient.
    """
    op = "linear_grad_project"
    acts, errs, restore = check_pair(op, acts, errs, {2: ("[B, I]", "[B, O]"), 3: ("[B, T, I]", "[B, T, O]")})
    if acts.shape[:-1] != errs.shape[:-1]:
        raise ValueError(
            f"{op}: errs must have the samples and positions of acts, {list(acts.shape[:-1])}, got {list(errs.shape[:-1])}"
        )
    if acts.dim() == 2:
        acts, errs = acts.unsqueeze(1), errs.unsqueeze(1)
    projector = Projector(proj_dim, bias, kind, nonzeros, seed, stream, column_offset, scale)
    return restore(_PROJECT(acts, errs, (), projector, num_columns, backend))
