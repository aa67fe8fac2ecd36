"""Operators without a rule: torch's own forward derivative, one tangent after the other."""

import contextlib
import warnings

import torch
from torch import Tensor
from torch.func import jvp
from torch.utils import _pytree as pytree

from .dual import Dual, combine
from .rule import has_slopes
from .where import Refusal, current_function, has_own_jvp, here

TORCHS = "aten", "prims"  # namespaces of operators
_SAID = set()  # operators and modules that have been warned of


def say(what: str, message: str):
    """Warn of this operator or module, once in a process."""
    if what not in _SAID:
        _SAID.add(what)
        warnings.warn(message, stacklevel=3)


def torch_derivative(run, func, args: tuple, kwargs: dict):
    """The operator's result, with tangents by torch.func.jvp.

    Raises:
        NotImplementedError: torch has no forward derivative of it.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    call = with_inputs(func, leaves, spec, places)
    inputs = [leaves[i] for i in places]
    name = func._schema.name
    draws = Draws(inputs[0].device) if torch.Tag.nondeterministic_seeded in func.tags else None
    with run.derivatives_on():
        results, form = pytree.tree_flatten(call(*(dual.primal for dual in inputs)))
        if not any(map(has_slopes, results)):
            return pytree.tree_unflatten(results, form)
        say(name, f"dual_forward: {name}{here(run)} has no rule of its own; torch.func.jvp does it, slower")
        results = [combine(run, value, lambda out: None) if has_slopes(value) else value for value in results]
        outputs = [value for value in results if isinstance(value, Dual)]
        if func.is_view:  # of which these are copies
            copy_of_view(inputs[0], outputs)
        try:
            # Without a derivative, operators of others than torch would give zeros.
            fill_tangents(call, inputs, results, strict=func.namespace not in TORCHS, draws=draws)
        except (NotImplementedError, RuntimeError) as error:
            if not _lacks_derivative(error):
                raise
            kind = Refusal if has_own_jvp(current_function()) else NotImplementedError
            raise kind(
                f"dual_forward: {name}{here(run)} has no rule, and torch cannot differentiate it: {first_line(error)}"
            ) from error
    return pytree.tree_unflatten(results, form)


def with_inputs(function, leaves: list, spec, places: list[int]):
    """The function of these arguments, flattened, as one of the leaves at these places alone."""
    constants = [None if isinstance(leaf, Dual) else leaf for leaf in leaves]

    def call(*inputs):
        filled = list(constants)
        for place, value in zip(places, inputs, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    return call


class Draws:
    """Random numbers of a run that is repeated for each tangent."""

    def __init__(self, device: torch.device):
        self._devices = [device.index] if device.type == "cuda" else []
        self._states = torch.get_rng_state(), [torch.cuda.get_rng_state(index) for index in self._devices]

    def kept(self):
        """A context that leaves torch's generators as they were at its start."""
        return torch.random.fork_rng(self._devices, device_type="cuda")

    def again(self):
        torch.set_rng_state(self._states[0])
        for index, state in zip(self._devices, self._states[1], strict=True):
            torch.cuda.set_rng_state(state, index)


def fill_tangents(call, inputs: list[Dual], results: list, *, strict: bool = False, draws: Draws | None = None):
    """Write the tangents of the duals among the results. One by one: vmap lacks some operators, warns of others, and refuses
    any that look at values."""
    places = [i for i, value in enumerate(results) if isinstance(value, Dual)]

    def numbers(*values):
        leaves = pytree.tree_leaves(call(*values))  # torch.func may give zeros where an operator gives none
        return tuple(leaves[i] for i in places)

    primals = tuple(_unexpanded(dual.primal) for dual in inputs)
    with contextlib.nullcontext() if draws is None else draws.kept():
        for k in range(inputs[0].run.count):
            if draws is not None:
                draws.again()
            slopes = jvp(numbers, primals, tuple(dual.tangents[k] for dual in inputs), strict=strict)[1]
            for i, slope in zip(places, slopes, strict=True):
                results[i].tangents[k].copy_(slope)


def _unexpanded(primal: Tensor) -> Tensor:
    """torch.func.jvp gives tangents the strides of the primal, and cannot write to one of expanded axes."""
    return primal.contiguous() if 0 in primal.stride() else primal


def copy_of_view(source: Dual, outputs: list[Dual]):
    """The outputs should be views of the source, but are copies, which no write may tell apart."""
    source.family.split = True
    for output in outputs:
        output.family = source.family
        source.family.add(output)


def _lacks_derivative(error: RuntimeError) -> bool:
    """Whether torch says that there is no forward derivative; anything else that went wrong is news of its own."""
    return isinstance(error, NotImplementedError) or "strict=True" in str(error)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def slope(run, func, primal: Tensor, args: tuple, kwargs: dict, tangent: float = 1.0) -> Tensor:
    """What a function that works on each element alone makes of this tangent at the primal: with 1, its derivative.

    float16 and bfloat16 in float32.
    """
    wide = _unexpanded(primal.float() if primal.dtype in (torch.float16, torch.bfloat16) else primal)
    with run.derivatives_on():
        return jvp(lambda x: func(x, *args, **kwargs), (wide,), (torch.full_like(wide, tangent),))[1].to(primal.dtype)
