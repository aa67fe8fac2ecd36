"""Rules of what works on each element alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dual import Dual, Run, combine
from .fallback import slope
from .norm import GroupNorm
from .rule import NoRule, rule
from .views import aligned, each


@rule(
    *(
        "silu",
        "gelu",
        "relu6",
        "sigmoid",
        "tanh",
        "mish",
        "elu",
        "selu",
        "celu",
        "softplus",
    ),
    *(
        "leaky_relu",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "hardshrink",
        "softshrink",
        "threshold",
        "clamp",
        "clamp_min",
    ),
    *(
        "clamp_max",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "square",
        "abs",
    ),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "sinc"),
    *("nan_to_num", "frac", "logit", "special_expit", "lgamma", "digamma"),
)
def pointwise(run: Run, func, x: Dual, *args, **kwargs):
    if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())) or not isinstance(x, Dual) or x.is_complex():
        raise NoRule  # a function of a complex number may have no one slope
    if func is torch.ops.aten.silu.default and isinstance(x.pending, GroupNorm):
        return x.pending.with_silu(run)
    primal = x.primal
    derivative = _DERIVATIVES.get(func)
    value = func(primal, *args, **kwargs)
    if isinstance(value, tuple):
        raise NoRule
    factor = slope(run, func, primal, args, kwargs) if derivative is None else derivative(primal, value)

    def fill(out: Tensor):
        torch.mul(x.tangents, factor, out=out)
        if func.overloadpacket in _CHOOSING:
            # Where torch takes 0 instead of the tangent, it does so of any tangent, also of inf and NaN.
            out.masked_fill_(slope(run, func, primal, args, kwargs, tangent=torch.nan) == 0, 0)

    return combine(run, value, fill)


def _silu_slope(x: Tensor, y: Tensor) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    gate = wide.sigmoid()
    return (gate * (1 + wide * (1 - gate))).to(x.dtype)


# The common ones, without the detour over torch.func.
_DERIVATIVES = {
    torch.ops.aten.silu.default: _silu_slope,
    torch.ops.aten.exp.default: lambda x, y: y,
}
_CHOOSING = {
    getattr(torch.ops.aten, name)
    for name in (
        *("relu6", "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "threshold", "sinc"),
        *("clamp", "clamp_min", "clamp_max"),
    )
}


@rule("relu")
def relu(run: Run, func, x: Dual):
    if x.is_complex():
        raise NoRule  # torch says what is wrong
    y = func(x.primal)
    # Chosen, as torch does: no tangent passes where y is 0, any where it is NaN.
    backward = torch.ops.aten.threshold_backward.grad_input
    return combine(run, y, lambda out: backward(x.tangents, y.expand_as(x.tangents), 0, grad_input=out))


@rule("log_sigmoid_forward")
def log_sigmoid(run: Run, func, x: Dual):
    y, buffer = func(x.primal)
    factor = slope(run, F.logsigmoid, x.primal, (), {})
    return combine(run, y, lambda out: torch.mul(x.tangents, factor, out=out)), buffer


@rule("pow")
def power(run: Run, func, x, exponent):
    if isinstance(exponent, (Tensor, complex)) or not isinstance(x, Dual) or x.is_complex():
        raise NoRule
    if exponent == 0:  # of any tangent, also inf and NaN
        return combine(run, func(x.primal, exponent), torch.Tensor.zero_)
    return combine(
        run,
        func(x.primal, exponent),
        lambda out: torch.mul(x.tangents, slope(run, func, x.primal, (exponent,), {}), out=out),
    )


@rule("neg")
def negate(run: Run, func, x: Dual):
    return each(x, torch.neg)


def value_of(a):
    return a.primal if isinstance(a, Dual) else a


def is_one(a) -> bool:
    """Whether a factor or divisor changes nothing; read only where that costs no wait for a device."""
    if isinstance(a, Tensor):
        return a.dim() == 0 and a.device.type == "cpu" and a.dtype != torch.bool and a.item() == 1
    return a == 1


@rule("mul")
def multiply(run: Run, func, a, b):
    if isinstance(a, Dual) and isinstance(b, Dual):
        primal = func(a.primal, b.primal)

        def fill(out: Tensor):
            first, second = aligned(a.tangents, primal.dim()), aligned(b.tangents, primal.dim())
            torch.mul(first, b.primal, out=out)
            out.addcmul_(second.to(out.dtype), a.primal.to(out.dtype))

        return combine(run, primal, fill)
    return scale(run, torch.mul, a, b) if isinstance(a, Dual) else scale(run, torch.mul, b, a)


@rule("div")
def divide(run: Run, func, a, b, *, rounding_mode=None):
    if rounding_mode is not None:
        raise NoRule
    if not isinstance(b, Dual):
        return scale(run, torch.div, a, b)
    primal = func(value_of(a), b.primal)

    def fill(out: Tensor):
        slope = (-primal / b.primal).to(out.dtype)
        torch.mul(aligned(b.tangents, primal.dim()), slope, out=out)
        if isinstance(a, Dual):
            out.addcdiv_(aligned(a.tangents, primal.dim()).to(out.dtype), b.primal.to(out.dtype))

    return combine(run, primal, fill)


def scale(run: Run, func, x: Dual, factor) -> Dual:
    """func(x, factor) of a function that is linear in x: torch.mul with a constant, or torch.div by one."""
    dims = max(x.dim(), factor.dim() if isinstance(factor, Tensor) else 0)
    dtype = _result_type(x, factor)
    if is_one(factor) and dtype == x.dtype and dims == x.dim():
        return x.shares(*x.settle())
    if isinstance(x.pending, GroupNorm) and dtype == x.dtype:
        folded = x.pending.scaled(run, func, factor)
        if folded is not None:
            return folded
    return each(x, lambda batch: func(aligned(batch, dims), factor).to(dtype))


@rule("add")
def add(run: Run, func, a, b, alpha=1):
    return _sum(run, torch.add, a, b, alpha)


@rule("sub")
def subtract(run: Run, func, a, b, alpha=1):
    return _sum(run, torch.sub, a, b, alpha)


@rule("rsub")
def subtract_from(run: Run, func, a, b, alpha=1):
    return _sum(run, torch.rsub, a, b, alpha)


def _sum(run: Run, func, a, b, alpha):
    if isinstance(a, Dual) and isinstance(b, Dual):
        dims = max(a.dim(), b.dim())
        dtype = _result_type(a, b.primal)
        if a.stack is not None and b.stack is not None and a.dtype == b.dtype:
            return Dual(run, (func(aligned(a.stack, dims), aligned(b.stack, dims), alpha=alpha),))
        primal = func(a.primal, b.primal, alpha=alpha)

        def fill(out: Tensor):
            first, second = aligned(a.tangents, dims), aligned(b.tangents, dims)
            out.copy_(func(first.to(dtype), second.to(dtype), alpha=alpha))

        return combine(run, primal, fill)
    x, constant = (a, b) if isinstance(a, Dual) else (b, a)
    # What the function is to x alone: x, alpha x or -x.
    sign = {(torch.add, True): 1, (torch.add, False): alpha, (torch.sub, True): 1, (torch.sub, False): -alpha}
    sign |= {(torch.rsub, True): -alpha, (torch.rsub, False): 1}
    factor = sign[func, x is a]
    dtype = _result_type(x, constant)
    if isinstance(x.pending, GroupNorm) and dtype == x.dtype and factor == 1:
        folded = x.pending.shifted(run, func, constant, x is a, alpha)
        if folded is not None:
            return folded
    primal = func(value_of(a), value_of(b), alpha=alpha)
    tangents = x.tangents
    if factor == 1 and primal.shape == x.shape and primal.dtype == x.dtype:
        return x.shares(primal, tangents)

    def fill(out: Tensor):
        out.copy_(aligned(tangents, primal.dim()))
        if factor != 1:
            out.mul_(factor)

    return combine(run, primal, fill)


def _result_type(x: Dual, other) -> torch.dtype:
    return torch.result_type(x.primal if x.dim() == 0 else _like(x), other)


def _like(x: Dual) -> Tensor:
    """A plain tensor of the type and rank that type promotion asks for, without computing x."""
    return torch.empty((1,), dtype=x.dtype, device="meta")


@rule("addcmul")
def addcmul(run: Run, func, x, a, b, *, value=1):
    return torch.add(x, torch.mul(a, b), alpha=value)


@rule("addcdiv")
def addcdiv(run: Run, func, x, a, b, *, value=1):
    return torch.add(x, torch.div(a, b), alpha=value)


@rule("lerp")
def lerp(run: Run, func, start, end, weight):
    return start + (end - start) * weight


@rule("where")
def where(run: Run, func, condition, a=None, b=None):
    if a is None or isinstance(condition, Dual):
        raise NoRule
    primal = func(condition, value_of(a), value_of(b))

    def fill(out: Tensor):
        # Chosen, not multiplied by 0 and 1: what is not taken leaves no trace, even inf.
        zero = torch.zeros((), dtype=out.dtype, device=out.device)
        first, second = (
            aligned(c.tangents, primal.dim()).to(out.dtype) if isinstance(c, Dual) else zero for c in (a, b)
        )
        torch.where(condition, first, second, out=out)

    return combine(run, primal, fill)


@rule("masked_fill")
def masked_fill(run: Run, func, x, mask, value):
    if isinstance(mask, Dual) or isinstance(value, Dual):
        raise NoRule
    primal = func(x.primal, mask, value)
    return combine(run, primal, lambda out: out.copy_(aligned(x.tangents, primal.dim())).masked_fill_(mask, 0))


@rule("native_dropout")
def dropout(run: Run, func, x: Dual, probability, train):
    value, kept = func(x.primal, probability, train)
    factor = kept.to(x.dtype) / (1 - probability) if train and probability < 1 else kept.to(x.dtype)
    return combine(run, value, lambda out: torch.mul(x.tangents, factor, out=out)), kept
