"""The projection of a convolution's per-sample gradient by definition: form it whole in float64, then project it."""

import torch
import torch.nn.functional as F

from .linear_grad_project import project_gradient


def weight_gradient(acts, errs, kernel_size, stride, padding, dilation, groups):
    """[B, K, C, H, W], [B, K, O, H', W'] -> [B, O, C / groups, kh, kw]: errors times the pixels under the kernel."""
    padded = F.pad(acts, (padding[1], padding[1], padding[0], padding[0])).unflatten(2, (groups, -1))
    errs = errs.unflatten(2, (groups, -1))  # [B, K, g, O / g, H', W']
    rows = torch.arange(errs.shape[4], device=errs.device) * stride[0]
    columns = torch.arange(errs.shape[5], device=errs.device) * stride[1]
    out = errs.new_zeros(errs.shape[0], groups, errs.shape[3], padded.shape[3], *kernel_size)
    for y in range(kernel_size[0]):
        for x in range(kernel_size[1]):
            seen = padded[..., rows[:, None] + y * dilation[0], columns + x * dilation[1]]  # [B, K, g, C / g, H', W']
            out[..., y, x] = torch.einsum("bkgohw,bkgchw->bgoc", errs, seen)
    return out.flatten(1, 2)


def conv2d_grad_project(
    acts, errs, proj_dim, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, bias=False,
    kind="rademacher", nonzeros=1, seed=0, stream=0, column_offset=0, scale=1.0,
):  # [B, K, C, H, W], [B, K, O, H', W'] -> [B, D]  # fmt: skip
    wide_acts, wide_errs = acts.to(torch.float64), errs.to(torch.float64)
    weight = weight_gradient(wide_acts, wide_errs, kernel_size, stride, padding, dilation, groups)
    sums = wide_errs.sum((1, 3, 4))
    out = project_gradient(weight, sums, proj_dim, bias, kind, nonzeros, seed, stream, column_offset, scale)
    return out.to(torch.promote_types(torch.promote_types(acts.dtype, errs.dtype), torch.float32))
