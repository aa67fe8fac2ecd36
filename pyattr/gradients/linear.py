"""Linear: ``y = x W^T + b``, so ``dW = sum over positions of err act^T`` and ``db = sum of err``."""

from torch import Tensor, nn

from ..ops._layers import Layer
from .rule import Rule, from_layer, put_sums


def linear_layer(module: nn.Linear, acts: Tensor, errs: Tensor) -> Layer:
    return Layer.linear(acts.flatten(1, -2), errs.flatten(1, -2))


def bias_gradient(module: nn.Linear, acts: Tensor | None, errs: Tensor, rows: slice, out: Tensor, add: bool):
    put_sums(errs, errs.dim() - 1, rows, out, add)


RULE = Rule(
    layers=(nn.Linear,),
    methods=("forward",),
    has_batch=lambda module, inputs: inputs.dim() >= 2,
    gradients={"weight": from_layer(linear_layer), "bias": bias_gradient},
    as_layer=linear_layer,
)
