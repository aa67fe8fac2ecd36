"""The tables of rules, and what rules share."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .dual import Dual

RULES: dict[str, Callable] = {}  # operator ("aten::add") -> rule(run, operator, *arguments)
FUNCTIONS: dict[Callable, Callable] = {}  # torch function -> rule(run, function, *arguments)


class NoRule(Exception):
    """Raised by a rule that does not cover its arguments: torch's own derivative takes over."""


def rule(*names: str):
    """Register a rule of these ATen operators, all overloads that return something new or a view.

    An operator that works in place (``add_``) is computed by the rule of the other one, and then written.
    """

    def register(function):
        RULES.update({f"aten::{name}": function for name in names})
        return function

    return register


def function_rule(function: Callable):
    """Register a rule of a function of torch that torch would otherwise take apart too far."""

    def register(rule):
        FUNCTIONS[function] = rule
        return rule

    return register


def duals(*trees) -> list[Dual]:
    """The duals among arguments, also in lists of them."""
    found = []
    for tree in trees:
        if isinstance(tree, Dual):
            found.append(tree)
        elif isinstance(tree, (tuple, list)):
            found += duals(*tree)
        elif isinstance(tree, dict):
            found += duals(*tree.values())
    return found


@functools.cache
def functional(func):
    """The operator that returns what ``func`` writes to its first argument (``add.Tensor`` for ``add_.Tensor``), or None."""
    namespace, name = func._schema.name.split("::")
    if not name.endswith("_") or namespace != "aten":
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    # By their arguments: names differ (transpose_ and transpose.int) or mislead (pow_.Scalar and pow.Tensor_Scalar).
    return next((overload for overload in overloads if _types(overload) == _types(func)), None)


def _types(func) -> list[str]:
    return [str(argument.type) for argument in func._schema.arguments]


def has_slopes(value) -> bool:
    """Whether it is a tensor of numbers that can have tangents, real or complex."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
