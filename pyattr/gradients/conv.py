"""Convolutions: the weight gradient correlates each sample's (padded) input with its errors; see `pyattr.ops._layers`.

The transposed convolution is the same with the roles of input and errors exchanged.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._layers import Layer
from .rule import Rule, from_layer, put_sums


def conv_layer(module: nn.Module, acts: Tensor, errs: Tensor) -> Layer:
    padding = module.padding
    if module.padding_mode != "zeros":
        acts = _pad(acts, module._reversed_padding_repeated_twice, module.padding_mode)
        padding = (0,) * len(module.kernel_size)
    elif padding == "valid":
        padding = (0,) * len(module.kernel_size)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = tuple(t // 2 for t in total)
        if any(t % 2 for t in total):  # torch pads the odd one on the right
            acts = _pad(acts, [side for t in reversed(total) for side in (0, t % 2)], "constant")
    return Layer(acts, errs, module.kernel_size, module.stride, padding, module.dilation, module.groups)


def conv_transpose_layer(module: nn.Module, acts: Tensor, errs: Tensor) -> Layer:
    padding, positions = module.padding, acts.shape[3:]
    settings = zip(positions, module.stride, module.dilation, module.kernel_size, strict=True)
    reach = [(count - 1) * stride + dilation * (kernel - 1) + 1 for count, stride, dilation, kernel in settings]
    added = [size + 2 * pad - end for size, pad, end in zip(errs.shape[3:], padding, reach, strict=True)]
    if any(more >= stride for more, stride in zip(added, module.stride, strict=True)):
        # So much output padding that the kernel would fit once more: cut what no weight reaches.
        sides = [side for pad, more in reversed([*zip(padding, added, strict=True)]) for side in (pad, pad - more)]
        errs, padding = _pad(errs, sides, "constant"), (0,) * len(padding)
    return Layer(errs, acts, module.kernel_size, module.stride, padding, module.dilation, module.groups)


def bias_gradient(module: nn.Module, acts: Tensor | None, errs: Tensor, rows: slice, out: Tensor, add: bool):
    put_sums(errs, 2, rows, out, add)


def _pad(images: Tensor, sides: list[int], mode: str) -> Tensor:
    return F.pad(images.flatten(0, 1), sides, mode=mode).unflatten(0, images.shape[:2])


def _has_batch(module: nn.Module, inputs: Tensor) -> bool:
    return inputs.dim() == len(module.kernel_size) + 2


CONV = Rule(
    layers=(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    methods=("forward", "_conv_forward"),
    has_batch=_has_batch,
    gradients={"weight": from_layer(conv_layer), "bias": bias_gradient},
    as_layer=conv_layer,
)

CONV_TRANSPOSE = Rule(
    layers=(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    methods=("forward",),
    has_batch=_has_batch,
    gradients={"weight": from_layer(conv_transpose_layer), "bias": bias_gradient},
    as_layer=conv_transpose_layer,
)
