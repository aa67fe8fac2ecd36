"""Rules of normalisations and softmax."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import group_norm_silu_jvp
from .dual import Dual, Run, combine
from .rule import NoRule, duals, rule


@dataclass(frozen=True)
class GroupNorm:
    """Group normalisation put off until it is known whether SiLU follows, so that both are done in one pass.

    Attributes:
        x: [B, C, *S]; x_dot: [K, B, C, *S].
        weight, bias: [C], or [B, C] after a scale and shift of each image's own.
    """

    x: Tensor
    x_dot: Tensor
    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def compute(self, silu: bool = False) -> tuple[Tensor, Tensor]:
        x, x_dot, groups = self.x, self.x_dot, self.groups
        own = any(a is not None and a.dim() == 2 and a.shape[0] > 1 for a in (self.weight, self.bias))
        weight, bias = (None if a is None else a.reshape(-1) if not own else
                        a.expand(x.shape[0], x.shape[1]).reshape(-1) for a in (self.weight, self.bias))  # fmt: skip
        if own:  # one image whose channels are all images' channels has the same groups
            x, x_dot = x.reshape(1, -1, *x.shape[2:]), x_dot.reshape(len(x_dot), 1, -1, *x.shape[2:])
            groups *= self.x.shape[0]
        out = group_norm_silu_jvp(x, x_dot, groups, weight, bias, eps=self.eps, silu=silu)
        return out.y.reshape(self.x.shape), out.y_dot.reshape(self.x_dot.shape)

    def with_silu(self, run: Run) -> Dual:
        return Dual(run, self.compute(silu=True))

    def deferred(self, run: Run) -> Dual:
        return Dual(run, (), like=self.x, pending=self)

    def _per_channel(self, factor) -> Tensor | None:
        """[B or 1, C] of a constant that is the same at all positions; None of another one."""
        if not isinstance(factor, Tensor):
            return self.x.new_full((1, self.x.shape[1]), factor)
        if factor.device != self.x.device or factor.dim() > self.x.dim() or not factor.is_floating_point():
            return None
        shape = [1] * (self.x.dim() - factor.dim()) + list(factor.shape)
        if any(size != 1 for size in shape[2:]):
            return None
        return factor.reshape(shape[:2]).expand(shape[0], self.x.shape[1])

    def scaled(self, run: Run, func, factor) -> Dual | None:
        """func(this, factor), a product or quotient, or None where it is no scale of channels."""
        factor = self._per_channel(factor)
        if factor is None:
            return None
        weight = self.x.new_ones(self.x.shape[1]) if self.weight is None else self.weight
        bias = None if self.bias is None else func(self.bias, factor)
        return replace(self, weight=func(weight, factor), bias=bias).deferred(run)

    def shifted(self, run: Run, func, shift, first: bool, alpha) -> Dual | None:
        """func(this, shift) or, unless first, func(shift, this): this plus or minus a constant; None where it is no shift of
        channels."""
        shift = self._per_channel(shift)
        if shift is None:
            return None
        bias = self.x.new_zeros(self.x.shape[1]) if self.bias is None else self.bias
        bias = func(bias, shift, alpha=alpha) if first else func(shift, bias, alpha=alpha)
        return replace(self, bias=bias).deferred(run)


@rule("native_group_norm")
def group_norm(run: Run, func, x, weight, bias, batch, channels, positions, groups, eps):
    if duals(weight, bias):
        raise NoRule
    return GroupNorm(x.primal, x.tangents, groups, weight, bias, eps).deferred(run), None, None


def _wide(a: Tensor) -> Tensor:
    return a.float() if a.dtype in (torch.float16, torch.bfloat16) else a


@rule("native_layer_norm")
def layer_norm(run: Run, func, x, shape, weight, bias, eps):
    if duals(weight, bias):
        raise NoRule
    primal, mean, deviation = func(x.primal, shape, weight, bias, eps)
    axes = tuple(range(-len(shape), 0))
    wide = _wide(x.primal)
    centred = wide - wide.mean(axes, keepdim=True)
    inverse = (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    normal = centred * inverse
    factor = inverse if weight is None else inverse * weight

    def fill(out: Tensor):
        tangents = _wide(x.tangents)
        moved = tangents - tangents.mean(axes, keepdim=True)
        along = (moved * normal).mean(axes, keepdim=True)
        out.copy_(moved.addcmul_(normal, along, value=-1).mul_(factor))

    return combine(run, primal, fill), mean, deviation


@rule("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
def batch_norm(run: Run, func, x, weight, bias, running_mean, running_var, training, momentum, eps):
    if duals(weight, bias):
        raise NoRule
    if training:
        if running_mean is not None:
            raise NotImplementedError(
                "dual_forward: batch normalisation in training mode would change its running statistics; call module.eval()"
            )
        if x.shape[0] != 1:
            raise NoRule
        # Over one image's positions: instance normalisation, a group of one channel each.
        return GroupNorm(x.primal, x.tangents, x.shape[1], weight, bias, eps).deferred(run), None, None
    primal, *rest = func(x.primal, weight, bias, running_mean, running_var, False, momentum, eps)
    factor = (_wide(running_var) + eps).rsqrt()
    factor = factor if weight is None else factor * weight
    factor = factor.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2))
    return combine(run, primal, lambda out: torch.mul(x.tangents, factor, out=out)), *rest


@rule("_softmax", "_safe_softmax")
def softmax(run: Run, func, x, dim, *settings, **options):
    primal = func(x.primal, dim, *settings, **options)
    dim = dim % max(x.dim(), 1)
    weight = _wide(primal)

    def fill(out: Tensor):
        product = _wide(x.tangents.to(primal.dtype)) * weight
        out.copy_(product.addcmul_(weight, product.sum(dim + 1, keepdim=True), value=-1))

    if x.dim() == 0:
        raise NoRule
    return combine(run, primal, fill)


@rule("_log_softmax")
def log_softmax(run: Run, func, x, dim, *settings):
    if x.dim() == 0:
        raise NoRule
    primal = func(x.primal, dim, *settings)
    weight = _wide(primal).exp()

    def fill(out: Tensor):
        tangents = _wide(x.tangents.to(primal.dtype))
        out.copy_(tangents - (tangents * weight).sum(dim % x.dim() + 1, keepdim=True))

    return combine(run, primal, fill)
