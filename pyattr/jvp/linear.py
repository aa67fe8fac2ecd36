"""Rules of convolutions, matrix products, resampling and sums: one library call on the primal and all tangents."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from .dual import Dual, Run, combine
from .rule import NoRule, duals, function_rule, rule
from .views import each, moved


def folded(batch: Tensor, function, dims: int) -> Tensor:
    """function([n B, ...]) as [n, B, ...] of a batch [n, B, ...]; of [n, ...] where the images have no axis B of their own.

    Args:
        dims: how many axes the function's argument has.
    """
    if batch.dim() == dims:
        return function(batch)
    if batch.dim() != dims + 1:
        raise NoRule
    return function(batch.flatten(0, 1)).unflatten(0, batch.shape[:2])


@rule("convolution")
def convolution(run: Run, func, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if duals(weight, bias):
        raise NoRule
    settings = stride, padding, dilation, transposed, output_padding, groups

    def convolve(images: Tensor) -> Tensor:
        if images.device.type == "cpu" and images.dim() == 4 and not transposed:
            # What oneDNN computes in; what follows keeps it, so the images are laid out once, not at each convolution.
            images = images.contiguous(memory_format=torch.channels_last)
        return func(images, weight, None, *settings)

    stack = folded(x.joined(), convolve, weight.dim())
    if bias is not None:
        stack[0].add_(bias.reshape(-1, *[1] * (weight.dim() - 2)))
    return Dual(run, (stack,))


def product(run: Run, func, a, b) -> Dual:
    """a @ b of matrices, or of as many batched matrices."""
    if not isinstance(b, Dual):
        if b.dim() == 2:
            stack = a.joined()
            return Dual(run, ((stack.reshape(-1, stack.shape[-1]) @ b).reshape(*stack.shape[:-1], b.shape[-1]),))
        return _each_slice(run, a, b)
    if not isinstance(a, Dual):
        return each(b, lambda batch: torch.matmul(a, batch)) if a.dim() == 2 else _each_slice(run, a, b)
    return _each_slice(run, a, b)


def _each_slice(run: Run, a, b) -> Dual:
    """One call for each tangent: a batch of batches would have to copy the factor that all have in common."""
    first, second = (x.primal if isinstance(x, Dual) else x for x in (a, b))
    primal = first @ second

    def fill(out: Tensor):
        for k in range(run.count):
            if isinstance(a, Dual):
                torch.matmul(a.tangents[k], second, out=out[k])
                if isinstance(b, Dual):
                    out[k] += first @ b.tangents[k]
            else:
                torch.matmul(first, b.tangents[k], out=out[k])

    return combine(run, primal, fill)


@rule("mm", "bmm")
def matmul(run: Run, func, a, b):
    return product(run, func, a, b)


@rule("addmm", "baddbmm")
def add_product(run: Run, func, x, a, b, *, beta=1, alpha=1):
    if not duals(a, b):
        raise NoRule
    result = product(run, func, a, b)
    if alpha != 1:
        result = Dual(run, tuple(part.mul_(alpha) for part in result.parts))
    if beta == 0:  # x may then hold anything, NaN too
        return result
    if isinstance(x, Dual):
        return torch.add(result, x, alpha=beta)
    result.primal.add_(x, alpha=beta)  # the product is ours alone
    return result


_RESAMPLE = [
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d")),
    *(f"_upsample_{kind}" for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d")),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "avg_pool2d", "avg_pool3d"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
]


@rule(*_RESAMPLE)
def resample(run: Run, func, x: Dual, *settings, **options):
    dims = int(re.search(r"(\d)d", func._schema.name)[1]) + 2
    return each(x, lambda batch: _nonempty(batch, lambda a: folded(a, lambda b: func(b, *settings, **options), dims)))


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(run: Run, func, x: Dual, dims, *settings):
    dims = [moved(axis, x.dim()) for axis in dims]
    return each(x, lambda batch: _nonempty(batch, lambda a: func(a, dims, *settings)))


def _nonempty(batch: Tensor, function) -> Tensor:
    """Of no slices, as of one: some operators refuse an empty batch."""
    return function(batch) if len(batch) else function(batch.new_zeros((1, *batch.shape[1:])))[:0]


@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool(run: Run, func, x: Dual, *settings, **options):
    primal, chosen = func(x.primal, *settings, **options)
    spatial = int(func._schema.name.split("max_pool")[1][0])
    places = chosen.flatten(-spatial)

    def fill(out: Tensor):
        tangents = x.tangents.flatten(-spatial)
        out.copy_(tangents.gather(-1, places.expand(run.count, *places.shape)).view(out.shape))

    return combine(run, primal, fill), chosen


@rule("constant_pad_nd")
def pad(run: Run, func, x: Dual, padding, value=0):
    result = each(x, lambda a: func(a, padding, 0))
    if value != 0:
        result.primal.copy_(func(x.primal, padding, value))
    return result


@function_rule(F.pad)
def pad_around(run: Run, x, pad, mode="constant", value=None):
    # Torch would write the pieces of a circular padding into an empty tensor, which has no tangents.
    if mode != "circular" or not isinstance(x, Dual):
        raise NoRule
    dims = len(pad) // 2 + 2
    return each(x, lambda batch: folded(batch, lambda a: F.pad(a, pad, mode), dims))


@rule("sum", "mean")
def total(run: Run, func, x: Dual, dim=None, keepdim=False, *, dtype=None):
    if x.dim() == 0:
        raise NoRule
    dims = range(x.dim()) if dim is None or (isinstance(dim, (list, tuple)) and not dim) else dim
    axes = [moved(axis, x.dim()) for axis in ([dims] if isinstance(dims, int) else dims)]
    reduce = torch.sum if func._schema.name == "aten::sum" else torch.mean
    return each(x, lambda a: reduce(a, axes, keepdim, dtype=dtype))


@rule("cumsum")
def running_total(run: Run, func, x: Dual, dim, *, dtype=None):
    return each(x, lambda a: torch.cumsum(a, moved(dim, x.dim()), dtype=dtype))
