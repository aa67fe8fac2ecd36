"""Convolutions: the weight gradient correlates each sample's (padded) input with its errors.

Two ways to compute it, chosen by where and on what:

- *unfolded*: patches times errors, one matrix product per sample. Copies the patches: costs with the size of the map.
- *grouped*: a library call, the weight gradient of a convolution that has the samples as its groups. Returns a gradient
  that must be copied: costs with the size of the weight. Used on the CPU in float32 for maps with more positions than
  the layer has output channels, which is where it was measured to be faster.

Both take a few samples at a time (``WORKSPACE_BYTES``).

The transposed convolution is the same with the roles of input and errors exchanged.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rule import Rule, put, put_product, put_sums

WORKSPACE_BYTES = 8 << 20  # more is slower: fresh memory has to be mapped, and leaves the cache


def conv_weight(module: nn.Module, acts: Tensor, errs: Tensor, rows: slice, out: Tensor, add: bool):
    spatial = len(module.kernel_size)
    padding = module.padding
    if module.padding_mode != "zeros":
        acts = _pad(acts, module._reversed_padding_repeated_twice, module.padding_mode)
        padding = (0,) * spatial
    elif padding == "valid":
        padding = (0,) * spatial
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = tuple(t // 2 for t in total)
        if any(t % 2 for t in total):  # torch pads the odd one on the right
            acts = _pad(acts, [side for t in reversed(total) for side in (0, t % 2)], "constant")
    _weight_gradient(acts, errs, rows, module, padding, out, add)


def conv_transpose_weight(module: nn.Module, acts: Tensor, errs: Tensor, rows: slice, out: Tensor, add: bool):
    padding, positions = module.padding, acts.shape[3:]
    settings = zip(positions, module.stride, module.dilation, module.kernel_size, strict=True)
    reach = [(count - 1) * stride + dilation * (kernel - 1) + 1 for count, stride, dilation, kernel in settings]
    added = [size + 2 * pad - end for size, pad, end in zip(errs.shape[3:], padding, reach, strict=True)]
    if any(more >= stride for more, stride in zip(added, module.stride, strict=True)):
        # So much output padding that the kernel would fit once more: cut what no weight reaches.
        sides = [side for pad, more in reversed([*zip(padding, added, strict=True)]) for side in (pad, pad - more)]
        errs, padding = _pad(errs, sides, "constant"), (0,) * len(padding)
    _weight_gradient(errs, acts, rows, module, padding, out, add)


def bias_gradient(module: nn.Module, acts: Tensor | None, errs: Tensor, rows: slice, out: Tensor, add: bool):
    put_sums(errs, 2, rows, out, add)


def _pad(images: Tensor, sides: list[int], mode: str) -> Tensor:
    return F.pad(images.flatten(0, 1), sides, mode=mode).unflatten(0, images.shape[:2])


def _weight_gradient(
    images: Tensor, errs: Tensor, rows: slice, module: nn.Module, padding: tuple[int, ...], out: Tensor, add: bool
):
    """Per-sample weight gradient of a zero-padded convolution.

    Args:
        images: [B, K, C, *size], what the kernel slides over.
        errs: [B, K, O, *positions], one value per kernel placement.
        rows: a slice of the O output channels.
        module: gives kernel_size, stride, dilation and groups.
        padding: zeros on each side.
        out: [B, R, C / groups, *kernel_size].
        add: whether to add to ``out``.
    """
    if module.groups == 1:
        _gradient(images, errs[:, :, rows], 1, module, padding, out, add)
        return
    channels, width = images.shape[2] // module.groups, errs.shape[2] // module.groups
    for start, stop in _group_pieces(rows, width):
        groups = range(start // width, (stop - 1) // width + 1)
        used = images[:, :, groups.start * channels : groups.stop * channels]
        piece = out[:, start - rows.start : stop - rows.start]
        if piece.is_contiguous():
            _gradient(used, errs[:, :, start:stop], len(groups), module, padding, piece, add)
        else:
            part = torch.empty_like(piece, memory_format=torch.contiguous_format)
            _gradient(used, errs[:, :, start:stop], len(groups), module, padding, part, False)
            put(part, piece, add)


def _group_pieces(rows: slice, width: int) -> Iterator[tuple[int, int]]:
    """Cut a range of output channels into at most three: the end of a group, whole groups, the start of a group."""
    first, last = -(-rows.start // width) * width, rows.stop // width * width
    cuts = [rows.start, rows.stop] if first > last else sorted({rows.start, first, last, rows.stop})
    return pairwise(cuts)


def _gradient(
    images: Tensor, errs: Tensor, groups: int, module: nn.Module, padding: tuple[int, ...], out: Tensor, add: bool
):
    positions = errs.shape[3:].numel()
    pointwise = all(k == s == 1 and p == 0 for k, s, p in zip(module.kernel_size, module.stride, padding, strict=True))
    if pointwise and images.shape[3:] == errs.shape[3:]:
        _put_patch_product(images.flatten(3), errs, groups, out, add)
        return
    on_cpu = images.device.type == "cpu" and images.dtype == torch.float32
    if images.dim() > 5 or (on_cpu and positions > errs.shape[2] // groups):
        method, sample_bytes = _put_grouped, out[0].nbytes
    else:
        method, sample_bytes = _put_unfolded, images[0].numel() * module.weight[0, 0].numel() * images.element_size()
    step = max(1, WORKSPACE_BYTES // max(1, sample_bytes))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        method(images[part], errs[part], groups, module, padding, out[part], add)


def _put_grouped(
    images: Tensor, errs: Tensor, groups: int, module: nn.Module, padding: tuple[int, ...], out: Tensor, add: bool
):
    batch_size, views = images.shape[:2]
    images, errs = images.transpose(0, 1), errs.transpose(0, 1)
    channels = (errs.shape[2], images.shape[2] // groups)
    # Only the shape of the weight counts.
    weight = images.new_empty(()).expand(batch_size * channels[0], channels[1], *module.kernel_size)
    _, grads, _ = torch.ops.aten.convolution_backward(
        errs.reshape(views, batch_size * channels[0], *errs.shape[3:]),
        images.reshape(views, -1, *images.shape[3:]),
        weight,
        None,
        module.stride,
        padding,
        module.dilation,
        False,
        [0] * len(padding),
        batch_size * groups,
        [False, True, False],
    )
    put(grads, out, add)


def _put_unfolded(
    images: Tensor, errs: Tensor, groups: int, module: nn.Module, padding: tuple[int, ...], out: Tensor, add: bool
):
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if images.dim() == 4:  # one spatial dimension: a map one pixel high
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        images, errs = images.unsqueeze(3), errs.unsqueeze(3)
    patches = F.unfold(images.flatten(0, 1), kernel, dilation, padding, stride)  # [B*K, C*k*k, L]
    _put_patch_product(patches.unflatten(0, images.shape[:2]), errs, groups, out, add)


def _put_patch_product(patches: Tensor, errs: Tensor, groups: int, out: Tensor, add: bool):
    """patches [B, K, C*k, L], errs [B, K, O, ...] -> [B, O, C*k/groups]."""
    patches = patches.unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)  # [B, g, K*L, C*k/g]
    errs = errs.flatten(3).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(3)  # [B, g, O/g, K*L]
    put_product(errs.flatten(0, 1), patches.flatten(0, 1), out, add)


def _has_batch(module: nn.Module, inputs: Tensor) -> bool:
    return inputs.dim() == len(module.kernel_size) + 2


CONV = Rule(
    layers=(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    methods=("forward", "_conv_forward"),
    has_batch=_has_batch,
    gradients={"weight": conv_weight, "bias": bias_gradient},
)

CONV_TRANSPOSE = Rule(
    layers=(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    methods=("forward",),
    has_batch=_has_batch,
    gradients={"weight": conv_transpose_weight, "bias": bias_gradient},
)
