"""Projection of a convolution's per-sample gradients, which are never in memory, nor are its patches."""

from ..reference.conv2d_grad_project import conv2d_grad_project as definition
from ._convolution import check_convolution, check_images
from ._layer_projection import LayerProjection, Projector, check_pair
from ._layers import Layer


def _by_definition(acts, errs, geometry, projector):
    return definition(
        acts, errs, projector.proj_dim, *geometry, projector.bias, projector.kind, projector.nonzeros, projector.seed,
        projector.stream, projector.column_offset, projector.scale,
    )  # fmt: skip


_PROJECT = LayerProjection("conv2d_grad_project", _by_definition, Layer)


def conv2d_grad_project(
    acts, errs, proj_dim, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, bias=False, kind="rademacher",
    nonzeros=1, seed=0, stream=0, column_offset=0, num_columns=None, scale=1.0, backend=None,
):  # fmt: skip
    """Project the per-sample gradients of a zero-padded 2-D convolution without forming them or unfolding its input.

    ``Y_b = scale * M vec(G_b)`` with ``G_b[o, c, i, j] = sum over k, y, x of errs[b, k, o, y, x] * acts[b, k, c, s y + d i - p,
    s x + d j - p]``, zero outside of the image, and M the matrix that `rademacher_project`, `gaussian_project`,
    `sparse_project` or `multisketch_project` has for these parameters: the projection of the flat gradient, columns row-major
    [O, C / groups, kh, kw], those of the bias (the sums of errs) behind them.

    Args:
        acts: [B, C, H, W] float16, bfloat16, float32 or float64 (reference only), the layer's input; [B, K, C, H, W] for K
            timesteps of each sample, whose gradients are summed. A torch tensor, NumPy array or CuPy array, any strides.
        errs: [B, O, H', W'] or [B, K, O, H', W'], likewise: gradients of the loss with respect to the layer's output.
        proj_dim: D.
        kernel_size, stride, padding, dilation: of the convolution, an integer or a pair, in pixels.
        groups: of the convolution.
        bias: whether O columns for the bias follow.
        kind: "rademacher", "gaussian", "sparse" or "multisketch".
        nonzeros: entries of a column, for "sparse".
        seed, stream: of the matrix, each in [0, 2^32).
        column_offset: the matrix's column for the first entry of the weight.
        num_columns: columns of the matrix in all; those of weight and bias by default, required with ``column_offset`` by
            "sparse" and "multisketch".
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

    Source: Rochette, Manoel, Tramel, "Efficient Per-Example Gradient Computations in Convolutional Neural Networks", 2019.
    """
    op = "conv2d_grad_project"
    shapes = {4: ("[B, C, H, W]", "[B, O, H', W']"), 5: ("[B, K, C, H, W]", "[B, K, O, H', W']")}
    acts, errs, restore = check_pair(op, acts, errs, shapes)
    if acts.dim() == 4:
        acts, errs = acts.unsqueeze(1), errs.unsqueeze(1)
    if acts.shape[:2] != errs.shape[:2]:
        raise ValueError(
            f"{op}: errs must have the samples and timesteps of acts, {list(acts.shape[:2])}, got {list(errs.shape[:2])}"
        )
    convolution = check_convolution(op, kernel_size, stride, padding, dilation, groups)
    check_images(op, convolution, acts, errs)
    projector = Projector(proj_dim, bias, kind, nonzeros, seed, stream, column_offset, scale)
    return restore(_PROJECT(acts, errs, convolution, projector, num_columns, backend))
