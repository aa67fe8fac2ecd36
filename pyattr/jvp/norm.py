"""Rules of normalisations and softmax."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..ops.group_norm_silu_jvp import OP, empty_like
from .dual import Dual, Run, combine
from .rule import NoRule, duals, function_rule, rule
from .where import here


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

    def compute(self, silu: bool = False) -> tuple[Tensor]:
        # What the op's public face does, with both results in one stack, which the next library call takes as it is.
        whole = empty_like(self.x, 1, len(self.x_dot) + 1)  # [K + 1, B, C, *S]
        positions = self.x.shape[2:].numel()
        x = self.x.reshape(*self.x.shape[:2], positions)  # [B, C, L]
        x_dot = self.x_dot.reshape(*self.x_dot.shape[:3], positions)  # [K, B, C, L]
        stack = whole.view(*whole.shape[:3], positions)
        if stack.numel() > 0:
            run = backends.choose(OP, None, x).run
            for images, weight, bias in self._alike():
                out = stack[0, images], stack[1:, images]
                run(x[images], x_dot[:, images], None, None, self.groups, weight, bias, float(self.eps), silu, out)
        return (whole,)

    def _alike(self):
        """The images with their weight and bias: all at once, or one by one where each has its own."""
        own = [a is not None and a.dim() == 2 and len(a) > 1 for a in (self.weight, self.bias)]
        for image in range(len(self.x)) if any(own) else [slice(None)]:
            row = [a if a is None or a.dim() == 1 else a[image if several else 0]
                   for a, several in zip((self.weight, self.bias), own, strict=True)]  # fmt: skip
            yield (slice(image, image + 1) if any(own) else image), *row

    def with_silu(self, run: Run) -> Dual:
        return Dual(run, self.compute(silu=True))

    def deferred(self, run: Run) -> Dual:
        return Dual(run, (), like=self.x, pending=self)

    def _per_channel(self, factor) -> Tensor | None:
        """[B or 1, C] of a constant that is the same at all positions; None of another one."""
        if not isinstance(factor, Tensor):
            return _wide(self.x.new_empty(0)).new_full((1, self.x.shape[1]), factor)
        if factor.device != self.x.device or factor.dim() > self.x.dim() or not factor.is_floating_point():
            return None
        shape = [1] * (self.x.dim() - factor.dim()) + list(factor.shape)
        sizes = *self.x.shape[:2], *[1] * (self.x.dim() - 2)  # nor may the sum or product be larger than this
        if any(size not in (1, own) for size, own in zip(shape, sizes, strict=True)):
            return None
        return _wide(factor).reshape(shape[:2]).expand(shape[0], self.x.shape[1])

    def scaled(self, run: Run, func, factor) -> Dual | None:
        """func(this, factor), a product or quotient, or None where it is no scale of channels."""
        factor = self._per_channel(factor)
        if factor is None:
            return None
        weight = self.x.new_ones(self.x.shape[1]) if self.weight is None else self.weight
        bias = None if self.bias is None else func(_wide(self.bias), factor)
        return replace(self, weight=func(_wide(weight), factor), bias=bias).deferred(run)

    def shifted(self, run: Run, func, shift, first: bool, alpha) -> Dual | None:
        """func(this, shift) or, unless first, func(shift, this): this plus or minus a constant; None where it is no shift of
        channels."""
        shift = self._per_channel(shift)
        if shift is None:
            return None
        bias = _wide(self.x.new_zeros(self.x.shape[1]) if self.bias is None else self.bias)
        bias = func(bias, shift, alpha=alpha) if first else func(shift, bias, alpha=alpha)
        return replace(self, bias=bias).deferred(run)


@dataclass(frozen=True)
class Statistic:
    """The groups' means or inverse deviations, which only torch's own derivatives and vmap ask for."""

    norm: GroupNorm
    inverse: bool
    shape: tuple[int, ...]  # [B, G] or, of one image, [G]

    def compute(self) -> tuple[Tensor, Tensor]:  # [*shape], [K, *shape]
        grouped = self.norm.groups, self.norm.x.shape[1] // self.norm.groups
        x = _wide(self.norm.x).unflatten(1, grouped).flatten(2)
        x_dot = _wide(self.norm.x_dot).unflatten(2, grouped).flatten(3)
        found = x.mean(-1), x_dot.mean(-1)
        if self.inverse:
            centred = x - found[0].unsqueeze(-1)
            inverse = (centred.square().mean(-1) + self.norm.eps).rsqrt()
            found = inverse, -(inverse**3) * (centred * x_dot).mean(-1)
        value, tangents = (part.to(self.norm.x.dtype) for part in found)
        return value.reshape(self.shape), tangents.reshape(len(tangents), *self.shape)


def _with_statistics(run: Run, norm: GroupNorm, *shape: int) -> tuple[Dual, Dual, Dual]:
    """What torch's normalisations return."""
    like = norm.x.new_empty(shape)
    parts = (Dual(run, (), like=like, pending=Statistic(norm, inverse, shape)) for inverse in (False, True))
    return norm.deferred(run), *parts


@function_rule(F.group_norm)
def any_group_norm(run: Run, x, num_groups, weight=None, bias=None, eps=1e-5):
    # Torch would make it contiguous first; the op takes any strides.
    if not isinstance(x, Dual) or duals(weight, bias) or x.dim() < 2 or x.shape[1] % num_groups:
        raise NoRule
    if any(a is not None and a.shape != x.shape[1:2] for a in (weight, bias)):
        raise NoRule  # torch says what is wrong
    _check_devices(run, x, weight=weight, bias=bias)
    return GroupNorm(x.primal, x.tangents, num_groups, weight, bias, eps).deferred(run)


@rule("native_group_norm")
def group_norm(run: Run, func, x, weight, bias, batch, channels, positions, groups, eps):
    if duals(weight, bias):
        raise NoRule
    _check_devices(run, x, weight=weight, bias=bias)
    norm = GroupNorm(x.primal, x.tangents, groups, weight, bias, eps)
    return _with_statistics(run, norm, len(x), groups)


def _check_devices(run: Run, x: Dual, **constants: Tensor | None):
    """The kernels take addresses: they would read another device's as their own."""
    for name, constant in constants.items():
        if constant is not None and constant.device != x.device:
            raise ValueError(
                f"dual_forward: {name} of the group normalisation{here(run)} must be on {x.device} as its input is, got "
                f"{constant.device}"
            )


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
        _check_devices(run, x, weight=weight, bias=bias)
        # Over one image's positions: instance normalisation, a group of one channel each.
        norm = GroupNorm(x.primal, x.tangents, x.shape[1], weight, bias, eps)
        reserve = [x.primal.new_empty(0, dtype=torch.uint8)] * (func._schema.name == "aten::cudnn_batch_norm")
        return *_with_statistics(run, norm, x.shape[1]), *reserve
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
