"""From torch's functions and operators to their rules."""

from collections.abc import Callable

import torch

from .dual import HANDLERS, Run
from .fallback import torch_derivative
from .inplace import write
from .rule import FUNCTIONS, RULES, NoRule, duals


def current_run(func, args: tuple, kwargs: dict) -> Run:
    run = duals(args, kwargs)[0].run
    if not run.open:
        raise RuntimeError(
            f"dual_forward: {func} got a value of an earlier call, which the module has kept; have it keep none"
        )
    return run


def call_function(func: Callable, args: tuple, kwargs: dict):
    chosen = FUNCTIONS.get(func)
    if chosen is not None:
        try:
            return chosen(current_run(func, args, kwargs), *args, **kwargs)
        except NoRule:
            pass
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def call_operator(func, args: tuple, kwargs: dict):
    run = current_run(func, args, kwargs)
    if func._schema.is_mutable:
        return write(run, func, args, kwargs, call_operator)
    chosen = RULES.get(func._schema.name)
    if chosen is not None:
        try:
            return chosen(run, func, *args, **kwargs)
        except NoRule:
            pass
    return torch_derivative(run, func, args, kwargs)


HANDLERS.update(function=call_function, operator=call_operator)
