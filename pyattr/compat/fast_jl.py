"""The functions of TRAK's extension fast_jl 0.1 on our kernels: any device, any width, any batch, no nvcc.

    import sys, torch
    import pyattr.compat.fast_jl
    sys.modules["fast_jl"] = pyattr.compat.fast_jl  # what trak.projectors.CudaProjector imports
    import fast_jl
    features = fast_jl.project_rademacher_8(torch.randn(8, 10_241), 512, 0, 108)  # [8, 512]

The result is ``Y = G M^T``, unscaled, with M [N, F] of +-1 or standard normal entries. M belongs to the seed alone: entry
(j, f) is ``pyattr.ops.sign_matrix([j], [f], seed)``, or that of ``normal_matrix``, on every device and whatever
``num_feature_tiles``. In fast_jl that number is part of the matrix: every tile of features has a generator of its own, and
callers pass the number of the card's multiprocessors, so that features from an A100 and an H100 cannot be compared. Nor can
ours be compared with features that fast_jl made. The suffix is the number of gradients that a pass of theirs takes; here it
means nothing, and each function takes any batch.
"""

import torch

from ..ops._arguments import check_integer
from ._dense import OPS


def project_rademacher_8(input, N, seed, num_feature_tiles):
    """``Y[b, j] = sum_f S[j, f] input[b, f]``, S random signs.

    Args:
        input: [B, F] float16, bfloat16 or float32 tensor, on any device, of any strides (float64 runs on the reference).
        N: the width, 1 to 2^32; not only multiples of 512.
        seed: in [0, 2^32).
        num_feature_tiles: a positive integer, without effect.

    Returns:
        [B, N] float32 on the input's device (float64 for float64), with no autograd history, as theirs has none. Inner products
        grow by a factor N in expectation, with the variance of ``pyattr.ops.rademacher_project``, which also states accuracy
        and extra memory. float32 is not rounded to float16 on the way.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    return _project("rademacher", input, N, seed, num_feature_tiles)


def project_normal_8(input, N, seed, num_feature_tiles):
    """``Y[b, j] = sum_f Z[j, f] input[b, f]``, Z standard normal.

    Arguments, shapes, scale and errors are those of :func:`project_rademacher_8`; variance, accuracy and extra memory those of
    ``pyattr.ops.gaussian_project``.
    """
    return _project("normal", input, N, seed, num_feature_tiles)


project_rademacher_16 = project_rademacher_32 = project_rademacher_8
project_normal_16 = project_normal_32 = project_normal_8


def _project(kind, input, N, seed, num_feature_tiles):
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"fast_jl: input must be a torch tensor, got {type(input).__name__}")
    if input.dim() != 2:
        raise ValueError(f"fast_jl: input must have shape [B, F], got {list(input.shape)}")
    N = check_integer("fast_jl", "N", N, 1, 2**32)
    seed = check_integer("fast_jl", "seed", seed, 0, 2**32 - 1)
    check_integer("fast_jl", "num_feature_tiles", num_feature_tiles, 1, 2**63 - 1)
    return OPS[kind](input.detach(), N, seed=seed)
