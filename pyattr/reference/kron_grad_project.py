"""Two-sided projection by definition: Y_b = scale * P_out G_b P_in^T, G_b [O, I] a layer's per-sample gradient written out.

P_out [k_out, O] and P_in [k_in, I] are sign or normal matrices of streams 2 * stream and 2 * stream + 1, or keep distinct
random rows and columns. With ``sketch_dim``, Y_b, flattened, is projected by the sparse matrix of (seed, stream) with one
nonzero.
Complexity: O * I multiply-adds per sample and position, k_out * O * I for the projection.
"""

import torch

from .gaussian_project import normal_matrix
from .layer_gradients import conv2d_gradients, linear_gradients
from .mask_project import mask_indices
from .rademacher_project import sign_matrix
from .sparse_project import sparse_project

MATRICES = {"rademacher": sign_matrix, "gaussian": normal_matrix}
BLOCK_ENTRIES = 1 << 17  # of a factor generated at a time: 20 MB of temporaries


def factor(kind, rows, columns, seed, stream, device, dtype=torch.float64):  # -> [R, C]
    """A factor of a dense kind, generated a few rows at a time."""
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    every_column = torch.arange(columns, device=device)
    step = max(1, BLOCK_ENTRIES // max(1, columns))
    for start in range(0, rows, step):
        part = torch.arange(start, min(start + step, rows), device=device)
        out[start : start + step] = MATRICES[kind](part, every_column, seed, stream)
    return out


def kron_grad_project(
    acts,
    errs,
    factor_dims,
    convolution=None,
    bias=False,
    kind="rademacher",
    sketch_dim=None,
    seed=0,
    stream=0,
    scale=1.0,
):  # [B, T, I], [B, T, O] or [B, K, C, H, W], [B, K, O, Ho, Wo] -> [B, k_out * k_in] or [B, sketch_dim]
    k_out, k_in = factor_dims
    if convolution is None:
        height, width = errs.shape[2], acts.shape[2] + bias
    else:
        kernel_height, kernel_width = convolution.kernel_size
        height, width = errs.shape[2], acts.shape[2] // convolution.groups * kernel_height * kernel_width + bias
    if kind == "mask":
        rows = mask_indices(height, k_out, seed, 2 * stream, acts.device)
        columns = mask_indices(width, k_in, seed, 2 * stream + 1, acts.device)
    else:
        p_out = factor(kind, k_out, height, seed, 2 * stream, acts.device)
        p_in = factor(kind, k_in, width, seed, 2 * stream + 1, acts.device)
    out = [torch.zeros(0, k_out * k_in, dtype=torch.float64, device=acts.device)]
    for start in range(acts.shape[0]):
        sample = acts[start : start + 1], errs[start : start + 1]
        grads = linear_gradients(*sample, bias) if convolution is None else conv2d_gradients(*sample, convolution, bias)
        grads = grads[0]  # [O, I]
        two_sided = grads[rows][:, columns] if kind == "mask" else p_out @ grads @ p_in.T  # [k_out, k_in]
        out.append(two_sided.reshape(1, -1))
    out = torch.cat(out)
    out = out * scale if sketch_dim is None else sparse_project(out, sketch_dim, seed, stream, scale=scale)
    return out.to(torch.float64 if torch.float64 in (acts.dtype, errs.dtype) else torch.float32)
