"""A tensor that carries its tangents: what flows through a module in place of x."""

import weakref
from typing import Protocol

import torch
from torch import Tensor

HANDLERS = {}  # "function" and "operator": what torch's functions and operators do with duals; dispatch.py fills it


class Run:
    """One call of dual_forward.

    Attributes:
        count: K.
        root: the module, whose parts error messages name.
        open: whether the call is still going on.
    """

    def __init__(self, count: int, root):
        self.count, self.root, self.open = count, root, True
        self._unsettled = []
        # Inside __torch_dispatch__ torch has switched its own derivatives off; these settings bring them back.
        self._keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def derivatives_on(self):
        """A context in which torch.func works, also where torch asks for one operator's result."""
        return torch._C._ForceDispatchKeyGuard(*self._keys)

    def defer(self, dual: "Dual"):
        self._unsettled.append(weakref.ref(dual))

    def settle(self):
        """Compute all that was put off: something is about to change in place that it may read."""
        for reference in self._unsettled:
            if (dual := reference()) is not None:
                dual.settle()
        self._unsettled.clear()


class Family:
    """Duals that are views of one another: what is written to one is seen by all.

    Attributes:
        shared: its memory may also be read by other families, so it is copied before the first write.
        split: a view had to be copied, so that a write could not be seen by all.
        seen: a plain tensor is a view of the primal too.
    """

    def __init__(self, shared: bool = False):
        self.shared, self.split, self.seen = shared, False, False
        self._members = []

    def add(self, dual: "Dual"):
        self._members.append(weakref.ref(dual))

    def alive(self) -> list["Dual"]:
        return [dual for reference in self._members if (dual := reference()) is not None]

    def unshare(self):
        """Move all members to a copy of their memory."""
        copies = {}

        def moved(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            copy = copies.setdefault(storage.data_ptr(), (storage, storage.clone()))[1]
            return tensor.new_empty(0).set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())

        for dual in self.alive():
            dual.parts = tuple(map(moved, dual.parts))
        self.shared = False


class Pending(Protocol):
    """A result that is not computed yet, because what follows may be computed with it in one pass."""

    def compute(self) -> tuple[Tensor, ...]: ...  # parts, as Dual has them


class Dual(torch.Tensor):
    """A primal [*shape] with K tangents [K, *shape], to torch a tensor of shape [*shape] without memory of its own.

    Attributes:
        run: the call that it belongs to.
        parts: one tensor [K + 1, *shape], the primal first, so that one library call serves all; or two, primal and tangents.
        family: the duals that share its memory as views.
        pending: what computes the parts, or None.
    """

    run: Run
    parts: tuple[Tensor, ...]
    family: Family
    pending: Pending | None

    @staticmethod
    def __new__(cls, run, parts, *, like=None, strides=None, family=None, pending=None):
        if like is None:
            like = parts[0][0] if len(parts) == 1 else parts[0]
        dual = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=strides or like.stride(), dtype=like.dtype, device=like.device
        )
        dual.run, dual.parts, dual.pending = run, parts, pending
        dual.family = Family() if family is None else family
        dual.family.add(dual)
        if pending is not None:
            run.defer(dual)
        return dual

    def settle(self) -> tuple[Tensor, ...]:
        """The parts, computed now if they were put off."""
        if self.pending is not None:
            self.parts, self.pending = self.pending.compute(), None
        return self.parts

    @property
    def stack(self) -> Tensor | None:
        """[K + 1, *shape], or None where primal and tangents lie apart."""
        parts = self.settle()
        return parts[0] if len(parts) == 1 else None

    @property
    def primal(self) -> Tensor:  # [*shape]
        parts = self.settle()
        return parts[0][0] if len(parts) == 1 else parts[0]

    @property
    def tangents(self) -> Tensor:  # [K, *shape]
        parts = self.settle()
        return parts[0][1:] if len(parts) == 1 else parts[1]

    def joined(self) -> Tensor:
        """[K + 1, *shape], copied where primal and tangents lie apart."""
        stack = self.stack
        if stack is not None:
            return stack
        stack = empty_stack(self.run, self.primal)
        stack[0].copy_(self.primal)
        stack[1:].copy_(self.tangents)
        return stack

    def assign(self, other: "Dual"):
        """Take over the parts of another dual that nothing else will write to."""
        self.parts, self.pending = other.settle(), None
        self.family.shared = other.family.shared

    def shares(self, *parts: Tensor) -> "Dual":
        """A dual of these parts, some of which are this one's own memory, though it is no view of it."""
        self.family.shared = True
        return Dual(self.run, parts, family=Family(shared=True))

    def __repr__(self) -> str:
        return f"Dual({list(self.shape)}, {self.dtype}, {self.run.count} tangents)"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return HANDLERS["function"](func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return HANDLERS["operator"](func, args, kwargs or {})


def empty_stack(run: Run, primal: Tensor) -> Tensor:
    """Unwritten [K + 1, *shape], each slice with its axes in the order in which the primal has them in memory."""
    order = sorted(range(primal.dim()), key=primal.stride, reverse=True)
    memory = primal.new_empty((run.count + 1, *(primal.shape[axis] for axis in order)))
    back = sorted(range(primal.dim()), key=order.__getitem__)
    return memory.permute(0, *(axis + 1 for axis in back))


def combine(run: Run, primal: Tensor, fill) -> Dual:
    """The dual of this primal, in one stack, whose tangents ``fill(tangents)`` writes."""
    stack = empty_stack(run, primal)
    stack[0].copy_(primal)
    fill(stack[1:])
    return Dual(run, (stack,))
