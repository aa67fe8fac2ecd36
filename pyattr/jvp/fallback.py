"""Operators without a rule: torch's own forward derivative, one tangent after the other."""

import warnings

import torch
from torch import Tensor
from torch.func import jvp
from torch.utils import _pytree as pytree

from .dual import Dual, combine
from .rule import has_slopes
from .where import here

_SAID = set()  # operators that have been warned of


def torch_derivative(run, func, args: tuple, kwargs: dict):
    """The operator's result, with tangents by torch.func.jvp.

    Raises:
        NotImplementedError: torch has no forward derivative of it.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    constants = [None if isinstance(leaf, Dual) else leaf for leaf in leaves]
    primals = tuple(leaves[i].primal for i in places)

    def call(*inputs):
        filled = list(constants)
        for place, value in zip(places, inputs, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return func(*args, **kwargs)

    def numbers(*inputs):
        return tuple(value for value in pytree.tree_leaves(call(*inputs)) if has_slopes(value))

    with run.derivatives_on():
        results, form = pytree.tree_flatten(call(*primals))
        if not any(map(has_slopes, results)):
            return pytree.tree_unflatten(results, form)
        name = func._schema.name
        if name not in _SAID:
            _SAID.add(name)
            warnings.warn(
                f"dual_forward: {name}{here(run)} has no rule of its own; torch.func.jvp does it, slower", stacklevel=2
            )
        results = [combine(run, value, lambda out: None) if has_slopes(value) else value for value in results]
        outputs = [value for value in results if isinstance(value, Dual)]
        if func.is_view:  # of which these are copies
            family = leaves[places[0]].family
            family.split = True
            for output in outputs:
                output.family = family
                family.add(output)
        strict = func.namespace != "aten"  # without a derivative, operators of others would give zeros
        try:
            # One by one: vmap lacks some operators, warns of others, and refuses any that look at values.
            for k in range(run.count):
                slopes = jvp(numbers, primals, tuple(leaves[i].tangents[k] for i in places), strict=strict)[1]
                for output, slope in zip(outputs, slopes, strict=True):
                    output.tangents[k].copy_(slope)
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise NotImplementedError(
                f"dual_forward: {name}{here(run)} has no rule, and torch cannot differentiate it: {reason}"
            ) from error
    return pytree.tree_unflatten(results, form)


def slope(run, func, primal: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """The derivative of a function that works on each element alone, at the primal; float16 and bfloat16 in float32."""
    wide = primal.float() if primal.dtype in (torch.float16, torch.bfloat16) else primal
    with run.derivatives_on():
        return jvp(lambda x: func(x, *args, **kwargs), (wide,), (torch.ones_like(wide),))[1].to(primal.dtype)
