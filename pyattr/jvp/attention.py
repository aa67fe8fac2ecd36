"""The rule of scaled dot product attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import attention_jvp
from .dual import Dual, Run
from .rule import NoRule, duals, function_rule, rule


@function_rule(F.scaled_dot_product_attention)
def attention(
    run: Run, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if dropout_p > 0 or not duals([query, key, value]):
        raise NoRule
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    if enable_gqa:
        key, value = (a.repeat_interleave(query.shape[-3] // a.shape[-3], -3) for a in (key, value))
    if isinstance(attn_mask, Dual):
        if is_causal:
            raise NoRule
        scores = query @ key.transpose(-1, -2) * scale + attn_mask
        return torch.ops.aten._safe_softmax(scores, -1) @ value  # zeros for a query that may attend to nothing
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    # [B, H]: the last of the leading axes is the heads'
    heads = lead[-1] if lead else 1
    shape = (math.prod(lead[:-1]), heads)

    def four(a: Tensor, lengths: tuple) -> Tensor:
        return a.expand(*lengths, *lead, *a.shape[-2:]).reshape(*lengths, *shape, *a.shape[-2:])

    primals, tangents = [], []
    for a in (query, key, value):
        primals.append(four(a.primal if isinstance(a, Dual) else a, ()))
        tangents.append(_tangents(a, lead, shape) if isinstance(a, Dual) else None)
    mask = attn_mask
    if mask is not None:
        full = (*lead, query.shape[-2], key.shape[-2])
        mask = mask if mask.dim() <= 4 and len(lead) == 2 else mask.expand(full).reshape(*shape, *full[-2:])
        if is_causal:
            raise NoRule  # torch refuses both together
    out = attention_jvp(*primals, *tangents, mask=mask, causal=is_causal, scale=scale)
    return Dual(run, (out.y.reshape(*lead, *out.y.shape[-2:]), out.y_dot.reshape(run.count, *lead, *out.y.shape[-2:])))


def _tangents(a: Dual, lead: tuple, shape: tuple) -> Tensor:
    tangents = a.tangents
    tangents = tangents[(slice(None), *[None] * (len(lead) + 2 - a.dim()))]
    return tangents.expand(len(tangents), *lead, *a.shape[-2:]).reshape(len(tangents), *shape, *a.shape[-2:])


@rule("_scaled_dot_product_flash_attention_for_cpu")
def attention_on_the_cpu(
    run: Run, func, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None
):
    """What TorchScript calls."""
    return attention(run, query, key, value, attn_mask, dropout_p, is_causal, scale), None
