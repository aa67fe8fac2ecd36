"""Operators that write to an argument."""

import torch
from torch import Tensor

from .dual import Dual
from .rule import functional
from .where import Refusal, here


def write(run, func, args: tuple, kwargs: dict, call):
    """Compute what is to be written with the operator that returns it, and write it.

    Args:
        call: ``(operator, args, kwargs)`` to the result by its rule.

    Raises:
        Refusal: the target is a tensor without tangents, or the write cannot be done here.
    """
    target, compute = args[0] if args else None, functional(func)
    name = func._schema.name
    if compute is None:
        raise Refusal(f"dual_forward: {name}{here(run)} writes to its arguments in a way that has no rule")
    if not isinstance(target, Dual):
        raise Refusal(
            f"dual_forward: {name}{here(run)} writes a value that depends on x to a tensor that does not; "
            "have the module make a new tensor instead"
        )
    result = call(compute, args, kwargs)
    if not isinstance(result, Dual):
        result = constant(run, result)
    if result.family is target.family:  # squeeze_ and the like write nothing
        with torch._C._DisableTorchDispatch():  # torch's idea of the target, which has no memory
            func(*args, **kwargs)
        target.parts = result.parts
        return target
    if result.shape != target.shape:
        raise Refusal(f"dual_forward: {name}{here(run)} changes a shape in place")
    run.settle()
    members = target.family.alive()
    if (
        len(members) == 1 and not target.family.seen
    ):  # nothing sees the memory but the target itself, which can change over to the result
        target.assign(result if result.dtype == target.dtype else result.to(target.dtype))
        return target
    if target.family.split:
        raise Refusal(f"dual_forward: {name}{here(run)} writes to a tensor of which a view had to be copied")
    if target.family.shared and target.family.seen:
        raise Refusal(
            f"dual_forward: {name}{here(run)} writes to a tensor that has been detached, and of which other results are made"
        )
    if target.family.shared:
        target.family.unshare()
    target.primal.copy_(result.primal)
    target.tangents.copy_(result.tangents)
    return target


def constant(run, value: Tensor) -> Dual:
    """A dual with zero tangents."""
    stack = value.new_zeros((run.count + 1, *value.shape))
    stack[0].copy_(value)
    return Dual(run, (stack,))
