"""Modules that hold what cannot be followed operator by operator: torch.func.jvp of the module, one tangent after the other."""

import contextlib
import threading
import weakref

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .dual import Dual, Run, combine
from .fallback import TORCHS, Draws, copy_of_view, fill_tangents, first_line, say, with_inputs
from .rule import has_slopes
from .where import Refusal, current_function, has_own_jvp, title

_KNOWN = weakref.WeakKeyDictionary()  # root module -> those of its parts that earlier calls have done as a whole
_PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Plan:
    """Which modules one call of dual_forward does as a whole.

    What refuses is found by running: each refusal adds the innermost module around it that has not been tried, and the
    whole is run again.
    """

    def __init__(self, root):
        self.root = root
        known = _KNOWN.get(root, ()) if isinstance(root, nn.Module) else ()
        self.chosen = list(known)
        self._tried, self._first, self._reasons = list(known), None, {}

    def add(self, refusal: Refusal):
        """Try the next module around what was refused.

        Raises:
            NotImplementedError: there is none.
        """
        self._first = self._first or str(refusal)
        around = [*refusal.modules, *([] if isinstance(self.root, nn.Module) else [self.root])]
        self.chosen = [part for part in self.chosen if part not in around]
        part = next((part for part in around if part not in self._tried), None)
        if part is None:
            reason = str(refusal).removeprefix("dual_forward: ")
            more = f"; and {reason}" if str(refusal) != self._first else ""
            raise NotImplementedError(self._first + more) from refusal
        self._tried.append(part)
        self.chosen.append(part)
        self._reasons[part] = str(refusal).removeprefix("dual_forward: ")

    def done(self):
        """The call has come to its end: keep what it found for the next."""
        if self._first is None:
            return
        for part in set(self.chosen) & set(self._reasons):
            name = title(self.root, part)
            say(name, f"dual_forward: {name} is done by torch.func.jvp, slower: {self._reasons[part]}")
        if isinstance(self.root, nn.Module):
            _KNOWN[self.root] = weakref.WeakSet(self.chosen)

    def call(self, run: Run, args: tuple, kwargs: dict):
        """The root's result."""
        with contextlib.ExitStack() as stack:
            for part in self.chosen:
                if isinstance(part, nn.Module):
                    for hook in Whole(run, part).hooks():
                        stack.callback(hook.remove)
            if self.root not in self.chosen or isinstance(self.root, nn.Module):
                return self.root(*args, **kwargs)
            whole = Whole(run, self.root)
            args, kwargs = whole.before(args, kwargs)
            return whole.after(self.root, self.root(*args, **kwargs))


class Whole:
    """A module that is differentiated as a whole wherever a call of dual_forward comes to it with duals.

    It runs once on primals, which gives its outputs and what else it does, and then once for each tangent.
    """

    def __init__(self, run: Run, part):
        self._run, self._part, self._thread = run, part, threading.get_ident()
        self._entered = []  # one entry for each call that has not returned

    def hooks(self):
        yield self._part.register_forward_pre_hook(self._on_entry, with_kwargs=True)  # behind those of the module
        yield self._part.register_forward_hook(self._on_return, with_kwargs=True, prepend=True)  # before them

    def _on_entry(self, part, args, kwargs):
        return self.before(args, kwargs) if threading.get_ident() == self._thread else None

    def _on_return(self, part, args, kwargs, output):
        return self.after(part.forward, output) if threading.get_ident() == self._thread else None

    def before(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with copies of primals for duals."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
        if not places:
            self._entered.append(None)
            return args, kwargs
        filled = list(leaves)
        for i in places:
            filled[i] = leaves[i].primal.clone()
        copies = [(filled[i], filled[i]._version) for i in places]
        self._entered.append((leaves, spec, places, copies, Draws(filled[places[0]].device)))
        return pytree.tree_unflatten(filled, spec)

    def after(self, function, output):
        """The output with duals for what has slopes."""
        entered = self._entered.pop()
        if entered is None:
            return output
        leaves, spec, places, copies, draws = entered
        inputs = [leaves[i] for i in places]
        results, form = pytree.tree_flatten(output)
        self._check(results, copies)
        results = [combine(self._run, value, lambda out: None) if has_slopes(value) else value for value in results]
        outputs = [value for value in results if isinstance(value, Dual)]
        for source, (copy, _) in zip(inputs, copies, strict=True):
            memory = _memory(copy)
            values = (value for value in pytree.tree_leaves(output) if has_slopes(value))
            views = [dual for dual, value in zip(outputs, values, strict=True) if _memory(value) == memory]
            if views:
                copy_of_view(source, views)
        call = with_inputs(function, leaves, spec, places)
        try:
            with _Repeatable():
                fill_tangents(call, inputs, results, draws=draws)
        except RuntimeError as error:  # NotImplementedError is one
            if isinstance(error, Refusal) or _out_of_memory(error):
                raise
            raise self._refusal(f"torch.func.jvp cannot differentiate it: {first_line(error)}") from error
        return pytree.tree_unflatten(results, form)

    def _check(self, results: list, copies: list[tuple[Tensor, int]]):
        for value in results:
            if isinstance(value, Dual):
                raise self._refusal("it computes with a value that depends on x and is none of its arguments")
            if not isinstance(value, _PLAIN):
                raise self._refusal(f"it returns a {type(value).__name__}, in which tensors cannot be found")
        if any(copy._version != version for copy, version in copies):
            raise self._refusal("it writes to its arguments")

    def _refusal(self, reason: str) -> Refusal:
        return Refusal(f"dual_forward: {title(self._run.root, self._part)} cannot be done as a whole: {reason}")


class _Repeatable(TorchDispatchMode):
    """Refuses what torch.func.jvp would get wrong without a word: operators of others than torch, as one without a derivative
    would give zeros, and random numbers that each run draws anew."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(a, torch.Generator) for a in (*args, *(kwargs or {}).values())):
            raise Refusal(f"dual_forward: {func._schema.name} draws from a generator of its own, for each tangent anew")
        if func.namespace not in TORCHS and not has_own_jvp(current_function()):
            raise Refusal(f"dual_forward: {func._schema.name} has no rule, and may have no derivative in torch")
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)  # of the CPU it has no type
