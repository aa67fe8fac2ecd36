"""Rules of what only moves elements: views, copies, indexing."""

import torch
from torch import Tensor

from .dual import Dual, Run, empty_stack
from .rule import NoRule, duals, rule


def moved(axis: int, dims: int) -> int:
    """An axis of [*shape] as one of [K + 1, *shape]."""
    if dims == 0:
        raise NoRule
    return axis if axis < 0 else axis + 1


def each(dual: Dual, function, *, view: bool = False) -> Dual:
    """Apply a function that treats the slices of [n, *shape] alike to primal and tangents."""
    parts = dual.settle()
    family = dual.family if view else None
    if len(parts) == 1:
        return Dual(dual.run, (function(parts[0]),), family=family)
    return Dual(dual.run, (function(parts[0].unsqueeze(0))[0], function(parts[1])), family=family)


def each_of_many(dual: Dual, function, *, view: bool = False) -> list[Dual]:
    """:func:`each` of a function that returns several tensors."""
    parts = dual.settle()
    family = dual.family if view else None
    if len(parts) == 1:
        return [Dual(dual.run, (piece,), family=family) for piece in function(parts[0])]
    pairs = zip(function(parts[0].unsqueeze(0)), function(parts[1]), strict=True)
    return [Dual(dual.run, (primal[0], tangents), family=family) for primal, tangents in pairs]


def resolved(dual: Dual, size) -> list[int]:
    """The size with its -1 filled in."""
    size = list(size)
    if -1 in size:
        rest = torch.Size(n for n in size if n != -1).numel()
        if rest == 0:
            raise NoRule
        size[size.index(-1)] = dual.numel() // rest
    return size


@rule("view", "_unsafe_view", "_reshape_alias")
def view(run: Run, func, x: Dual, size, *strides):
    if isinstance(size, torch.dtype):
        raise NoRule
    size = resolved(x, size)
    try:
        return each(x, lambda a: a.view(len(a), *size), view=True)
    except RuntimeError:  # the memory lies otherwise than torch believes, as a faster library call left it
        x.family.split = True
        return each(x, lambda a: a.reshape(len(a), *size), view=True)


@rule("view_as_real", "view_as_complex")
def view_as(run: Run, func, x: Dual):
    return each(x, func, view=True)


@rule("alias", "lift_fresh")
def alias(run: Run, func, x: Dual):
    return each(x, lambda a: a, view=True)


@rule("permute")
def permute(run: Run, func, x: Dual, dims):
    return each(x, lambda a: a.permute(0, *(axis % x.dim() + 1 for axis in dims)), view=True)


@rule("transpose")
def transpose(run: Run, func, x: Dual, dim0, dim1):
    dim0, dim1 = moved(dim0, x.dim()), moved(dim1, x.dim())
    return each(x, lambda a: a.transpose(dim0, dim1), view=True)


@rule("t")
def t(run: Run, func, x: Dual):
    return each(x, lambda a: a.transpose(1, 2), view=True) if x.dim() == 2 else alias(run, func, x)


@rule("unsqueeze")
def unsqueeze(run: Run, func, x: Dual, dim):
    return each(x, lambda a: a.unsqueeze(dim if dim < 0 else dim + 1), view=True)


@rule("squeeze")
def squeeze(run: Run, func, x: Dual, dim=None):
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = {axis % max(x.dim(), 1) for axis in dims}
    gone = [axis + 1 for axis in dims if axis < x.dim()]
    return each(x, lambda a: a.squeeze(gone), view=True)


@rule("expand")
def expand(run: Run, func, x: Dual, size, *, implicit=False):
    added = len(size) - x.dim()
    return each(x, lambda a: a[(slice(None), *[None] * added)].expand(len(a), *size), view=True)


@rule("select")
def select(run: Run, func, x: Dual, dim, index):
    return each(x, lambda a: a.select(moved(dim, x.dim()), index), view=True)


@rule("slice")
def slice_(run: Run, func, x: Dual, dim=0, start=None, end=None, step=1):
    dim = moved(dim, x.dim())
    return each(x, lambda a: func(a, dim, start, end, step), view=True)


@rule("diagonal")
def diagonal(run: Run, func, x: Dual, offset=0, dim1=0, dim2=1):
    dim1, dim2 = moved(dim1, x.dim()), moved(dim2, x.dim())
    return each(x, lambda a: a.diagonal(offset, dim1, dim2), view=True)


@rule("unfold")
def unfold(run: Run, func, x: Dual, dim, size, step):
    return each(x, lambda a: a.unfold(moved(dim, x.dim()), size, step), view=True)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(run: Run, func, x: Dual, sizes, dim=0):
    return each_of_many(x, lambda a: a.split(sizes, moved(dim, x.dim())), view=True)


@rule("unbind")
def unbind(run: Run, func, x: Dual, dim=0):
    return each_of_many(x, lambda a: a.unbind(moved(dim, x.dim())), view=True)


@rule("clone")
def clone(run: Run, func, x: Dual, *, memory_format=None):
    like = torch.empty_like(x.primal, memory_format=memory_format or torch.preserve_format)
    return _copied(run, x, empty_stack(run, like))


@rule("_to_copy")
def to_copy(run: Run, func, x: Dual, *, dtype=None, device=None, memory_format=None, **options):
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return func(x.primal, dtype=dtype, device=device, memory_format=memory_format, **options)
    like = torch.empty_like(x.primal, dtype=dtype, device=device, memory_format=memory_format or torch.preserve_format)
    return _copied(run, x, empty_stack(run, like))


@rule("copy")
def copy(run: Run, func, x, source, non_blocking=False):
    target = x.primal if isinstance(x, Dual) else x
    stack = empty_stack(run, target)
    if isinstance(source, Dual):
        stack[0].copy_(source.primal)
        stack[1:].copy_(aligned(source.tangents, target.dim()))
    else:
        stack[0].copy_(source)
        stack[1:].zero_()
    return Dual(run, (stack,))


@rule("fill")
def fill(run: Run, func, x, value):
    # What torch makes of an assignment (y[0] = value) where the value has no axes.
    return copy(run, func, x, value) if isinstance(value, Dual) else func(x.primal, value)


def _copied(run: Run, x: Dual, stack: Tensor) -> Dual:
    if x.stack is not None:
        stack.copy_(x.stack)
    else:
        stack[0].copy_(x.primal)
        stack[1:].copy_(x.tangents)
    return Dual(run, (stack,))


def aligned(batch: Tensor, dims: int) -> Tensor:
    """[n, *shape] with ones before the shape, so that it broadcasts like a shape of ``dims`` axes."""
    missing = dims - (batch.dim() - 1)
    return batch if missing <= 0 else batch[(slice(None), *[None] * missing)]


@rule("flip")
def flip(run: Run, func, x: Dual, dims):
    return each(x, lambda a: a.flip([moved(axis, x.dim()) for axis in dims]))


@rule("roll")
def roll(run: Run, func, x: Dual, shifts, dims=()):
    if not dims:
        raise NoRule
    return each(x, lambda a: a.roll(shifts, [moved(axis, x.dim()) for axis in dims]))


@rule("repeat")
def repeat(run: Run, func, x: Dual, repeats):
    return each(x, lambda a: aligned(a, len(repeats)).repeat(1, *repeats))


@rule("tril", "triu", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def slices_alike(run: Run, func, x: Dual, *settings):
    return each(x, lambda a: func(a, *settings) if a.numel() else _empty(func, a, settings))


def _empty(func, batch: Tensor, settings) -> Tensor:
    """An operator's result for no slices, which some refuse."""
    return func(batch.new_zeros((1, *batch.shape[1:])), *settings)[: len(batch)]


@rule("index_select")
def index_select(run: Run, func, x, dim, index):
    if duals(index):
        raise NoRule
    return each(x, lambda a: a.index_select(moved(dim, x.dim()), index))


@rule("gather")
def gather(run: Run, func, x: Dual, dim, index, *, sparse_grad=False):
    dim = moved(dim, x.dim())
    return each(x, lambda a: a.gather(dim, index.expand(len(a), *index.shape)))


@rule("index")
def index(run: Run, func, x: Dual, indices):
    given = [axis for axis, one in enumerate(indices) if one is not None]
    # Apart from one another, indices put their own axes first, before the tangents' one too.
    if given != list(range(given[0], given[-1] + 1)):
        raise NoRule
    return each(x, lambda a: func(a, [None, *indices]))


@rule("cat")
def cat(run: Run, func, tensors, dim=0):
    tensors = [a for a in tensors if a.shape != (0,)] or list(tensors[:1])  # torch's leave for lists that start empty
    dims, dtype = tensors[0].dim(), _common_type(tensors)
    axis = dim % dims
    if all(isinstance(a, Dual) and a.stack is not None and a.dtype == dtype for a in tensors):
        stacks = [a.stack for a in tensors]
        if dims == 4 and axis > 0 and all(a.flatten(0, 1).data_ptr() == a.data_ptr() for a in stacks):
            # With four axes torch keeps channels_last.
            joined = torch.cat([a.flatten(0, 1) for a in stacks], axis)
            return Dual(run, (joined.unflatten(0, (run.count + 1, tensors[0].shape[0])),))
        return Dual(run, (torch.cat(stacks, axis + 1),))
    primal = torch.cat([a.primal if isinstance(a, Dual) else a for a in tensors], axis)
    stack = empty_stack(run, primal)
    stack[0].copy_(primal)
    start = 0
    for a in tensors:
        part = stack[1:].narrow(axis + 1, start, a.shape[axis])
        if isinstance(a, Dual):
            part.copy_(a.tangents)
        else:
            part.zero_()
        start += a.shape[axis]
    return Dual(run, (stack,))


@rule("stack")
def stack(run: Run, func, tensors, dim=0):
    dim = dim % (tensors[0].dim() + 1)
    return torch.cat([a.unsqueeze(dim) for a in tensors], dim)


def _common_type(tensors) -> torch.dtype:
    dtype = tensors[0].dtype
    for a in tensors[1:]:
        dtype = torch.promote_types(dtype, a.dtype)
    return dtype
