"""Embedding: row ``i`` of the gradient is the sum of the errors at the positions that looked ``i`` up."""

import torch
from torch import Tensor, nn

from .rule import Rule, put


def weight_gradient(module: nn.Embedding, acts: Tensor, errs: Tensor, rows: slice, out: Tensor, add: bool):
    batch_size, count = acts.shape[0], rows.stop - rows.start
    ids = acts.flatten(1).long() - rows.start  # [B, M]
    wanted = (ids >= 0) & (ids < count)
    if module.padding_idx is not None:
        wanted &= ids != module.padding_idx - rows.start
    # One tall table [B * R, E], so that torch's own embedding gradient (deterministic on every device) does the sums.
    table = ids + count * torch.arange(batch_size, device=ids.device)[:, None]
    errs = errs.reshape(*ids.shape, -1)[wanted]  # [M', E]
    grads = torch.ops.aten.embedding_dense_backward(errs, table[wanted], batch_size * count, -1, False)
    put(grads, out, add)


def refuse(module: nn.Embedding) -> str:
    if module.max_norm is not None:
        return "max_norm rescales its weight during the forward pass"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq makes a sample's gradient depend on the other samples"
    return ""


RULE = Rule(
    layers=(nn.Embedding,),
    methods=("forward",),
    has_batch=lambda module, inputs: inputs.dim() >= 1,
    gradients={"weight": weight_gradient},
    refuse=refuse,
)
