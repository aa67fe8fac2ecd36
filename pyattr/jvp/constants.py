"""Operators whose results do not depend on x, or only in steps: they see the primal and return a plain tensor."""

from .dual import Dual, Run
from .rule import rule
from .where import Refusal, current_function, has_own_jvp, here


@rule(
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full", "zero", "bernoulli"),
    *("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "isposinf", "isneginf", "equal", "signbit"),
    *(
        "logical_not",
        "logical_and",
        "logical_or",
        "logical_xor",
        "any",
        "all",
        "nonzero",
        "argmax",
        "argmin",
        "argsort",
    ),
    *("sign", "floor", "ceil", "round", "trunc", "bucketize", "searchsorted"),
    *("_local_scalar_dense", "is_nonzero"),
)
def constant(run: Run, func, *args, **kwargs):
    return func(*(a.primal if isinstance(a, Dual) else a for a in args), **kwargs)


@rule("detach")
def detach(run: Run, func, x: Dual):
    function = current_function()
    if function is not None:  # what it computes of the plain value may well have a derivative, which only it knows
        kind = Refusal if has_own_jvp(function) else NotImplementedError
        raise kind(
            f"dual_forward: {function.__name__}{here(run)}, a torch.autograd.Function, detaches a value that depends on x in "
            "its forward"
        )
    x.family.seen = True
    return func(x.primal)
