"""Per-sample weight gradients of a layer by definition, in float64, as matrices [O, I] with one row per output channel.

Linear: G_b = sum_t errs[b, t] acts[b, t]^T. Convolution: the same with the patches of the zero-padded images as activations,
I = (C / groups) kh kw in the order of the weight, the patches of a group meeting the errors of its output channels alone.
With a bias, its gradient (the errors' sum) is one more column: an activation that is always 1.
"""

import torch
import torch.nn.functional as F


def linear_gradients(acts, errs, bias):  # [B, T, I], [B, T, O] -> [B, O, I (+ 1)]
    acts, errs = acts.to(torch.float64), errs.to(torch.float64)
    if bias:
        acts = torch.cat([acts, torch.ones_like(acts[..., :1])], -1)
    return errs.mT @ acts


def conv2d_gradients(images, errs, convolution, bias):  # [B, K, C, H, W], [B, K, O, Ho, Wo] -> [B, O, I (+ 1)]
    kernel_size, stride, padding, dilation, groups = convolution
    batch, views, channels = errs.shape[:3]
    patches = F.unfold(
        images.to(torch.float64).flatten(0, 1), kernel_size, dilation, padding, stride
    )  # [B K, C kh kw, L]
    patches = patches.reshape(batch, views, groups, patches.shape[1] // groups, patches.shape[2])
    if bias:
        patches = torch.cat([patches, torch.ones_like(patches[:, :, :, :1])], 3)
    errs = errs.to(torch.float64).reshape(batch, views, groups, channels // groups, patches.shape[4])
    return torch.einsum("bkgol,bkgil->bgoi", errs, patches).flatten(1, 2)
