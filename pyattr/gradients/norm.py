"""GroupNorm and LayerNorm: ``y = w x_hat + b``, so ``dw = sum of err x_hat`` and ``db = sum of err``.

x_hat is computed again from the input: keeping it would cost as much memory as the activations, and the shortcut
``rstd (sum err x - mean sum err)`` loses digits where the mean is large.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .rule import Rule, put, put_sums


def group_norm_weight(module: nn.GroupNorm, acts: Tensor, errs: Tensor, rows: slice, out: Tensor, add: bool):
    normal = F.group_norm(acts.flatten(0, 1), module.num_groups, eps=module.eps).view_as(acts)  # [B, K, C, ...]
    put_sums(normal * errs, 2, rows, out, add)


def group_norm_bias(module: nn.GroupNorm, acts: Tensor | None, errs: Tensor, rows: slice, out: Tensor, add: bool):
    put_sums(errs, 2, rows, out, add)


def layer_norm_weight(module: nn.LayerNorm, acts: Tensor, errs: Tensor, rows: slice, out: Tensor, add: bool):
    normal = F.layer_norm(acts, module.normalized_shape, eps=module.eps)
    layer_norm_bias(module, None, normal * errs, rows, out, add)


def layer_norm_bias(module: nn.LayerNorm, acts: Tensor | None, errs: Tensor, rows: slice, out: Tensor, add: bool):
    errs = errs.flatten(1, errs.dim() - len(module.normalized_shape) - 1)  # [B, M, *normalized_shape]
    put(errs[:, :, rows].sum(1), out, add)


GROUP_NORM = Rule(
    layers=(nn.GroupNorm,),
    methods=("forward",),
    has_batch=lambda module, inputs: inputs.dim() >= 2,
    gradients={"weight": group_norm_weight, "bias": group_norm_bias},
)

LAYER_NORM = Rule(
    layers=(nn.LayerNorm,),
    methods=("forward",),
    has_batch=lambda module, inputs: inputs.dim() > len(module.normalized_shape),
    gradients={"weight": layer_norm_weight, "bias": layer_norm_bias},
)
