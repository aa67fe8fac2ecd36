"""Linear: ``y = x W^T + b``, so ``dW = sum over positions of err act^T`` and ``db = sum of err``."""

from torch import Tensor, nn

from .rule import Rule, put_product, put_sums


def weight_gradient(module: nn.Linear, acts: Tensor, errs: Tensor, rows: slice, out: Tensor, add: bool):
    acts = acts.flatten(1, -2)  # [B, M, I]
    errs = errs.flatten(1, -2)[..., rows]  # [B, M, R]
    put_product(errs.transpose(1, 2), acts, out, add)


def bias_gradient(module: nn.Linear, acts: Tensor | None, errs: Tensor, rows: slice, out: Tensor, add: bool):
    put_sums(errs, errs.dim() - 1, rows, out, add)


RULE = Rule(
    layers=(nn.Linear,),
    methods=("forward",),
    has_batch=lambda module, inputs: inputs.dim() >= 2,
    gradients={"weight": weight_gradient, "bias": bias_gradient},
)
