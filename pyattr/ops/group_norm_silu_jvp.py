"""Group normalisation with SiLU in forward mode: one primal, many tangents."""

import math
from typing import NamedTuple

import torch

from .. import arrays, backends, threads
from ..backends import Backend
from ..reference import group_norm_silu_jvp as reference
from ._arguments import check_integer
from ._projection import DTYPES as PRECISIONS

OP = "group_norm_silu_jvp"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LIBRARY = torch.library.Library("pyattr", "FRAGMENT")


class GroupNormJvp(NamedTuple):
    """What :func:`group_norm_silu_jvp` returns."""

    y: torch.Tensor  # [B, C, *S]
    y_dot: torch.Tensor  # [K, B, C, *S]
    sum: torch.Tensor | None = None  # [B, C, *S]
    sum_dot: torch.Tensor | None = None  # [K, B, C, *S]


def group_norm_silu_jvp(
    x, x_dot, num_groups, weight=None, bias=None, *, eps=1e-5, silu=True, residual=None, residual_dot=None, backend=None
) -> GroupNormJvp:
    """Group normalisation and SiLU of a sum, and their derivatives along K directions.

    With ``s = x + residual``, each group's ``xhat = (s - mean(s)) / sqrt(var(s) + eps)`` and ``z = weight * xhat + bias``:

        ``y = z * sigmoid(z)``,
        ``y_dot[k] = silu'(z) * weight / sqrt(var(s) + eps) * (s_dot[k] - mean(s_dot[k]) - xhat * mean(xhat * s_dot[k]))``,

    means and (biased) variance over the C / num_groups channels and all positions of a group. Weight and bias are constants.

    Args:
        x: [B, C, *S] float16, bfloat16, float32 or float64 (reference only), S of any rank, also none; a torch tensor, NumPy
            array or CuPy array, any strides.
        x_dot: [K, B, C, *S] tangents of x, of its dtype and device.
        num_groups: G, divides C.
        weight: [C] floating point; None: ones.
        bias: [C] floating point; None: zeros.
        eps: added to the variance; finite and not negative.
        silu: False leaves SiLU out, ``y = z``.
        residual: [B, C, *S], added to x first; of its dtype.
        residual_dot: [K, B, C, *S], its tangents; None: zeros.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        GroupNormJvp: ``y`` [B, C, *S] and ``y_dot`` [K, B, C, *S]; with a residual also ``sum`` = s and ``sum_dot`` = s_dot
        (x_dot itself where residual_dot is None), else None. Of the dtype, kind and device of ``x``, rounded once, at the end;
        not differentiable. y and sum are channels-last where x is, y_dot and sum_dot where x_dot is, otherwise contiguous.
        The bits of y and y_dot[k] do not depend on the other tangents, samples and groups, nor on the run; on the CPU also not
        on the thread count, the layout or the SIMD level. Sums are float32 of at most 16 elements, joined in float64, on the
        CPU (the primal's float64 throughout), and float32 on cuda and triton; every backend is tested to 2e-6 of a result's
        norm, beside the rounding of its dtype. Where a tangent is nearly in the span of 1 and xhat, what is left of it
        has the error of what cancels: about 1e-6 of ``slope * |s_dot|``.
        NaN or inf in a group of s makes that group NaN in y and every y_dot; in a group of s_dot[k] it leaves nothing finite in
        that of y_dot[k]. A tangent of zeros gives zeros.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: a copy of an input whose spatial axes cannot be walked as one. CPU, per thread 12 bytes for each element of a
    group (channels-last, 8 bytes for each of 16 channels or a group, whichever is more, and 4 for each of a group). CUDA, none.
    Triton, a copy of an input that is neither contiguous nor channels-last, or otherwise than the output that is like it.
    Reference, about eight times x_dot in float64.

    Time: on the CPU channels-last costs about three times contiguous, as elements are reordered one by one. Tangents of
    float32 are written past the caches where all of them take more than 32 MB.

    Source: Wu and He, "Group Normalization", 2018, equations 1 to 3; its derivative by the chain rule.
    """
    x, restore = _check(x, "x", None, "[B, C, *S]")
    if x.dim() < 2:
        raise ValueError(f"{OP}: x must have shape [B, C, *S], got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{OP}: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    channels = x.shape[1]
    x_dot = _check_tangents(x_dot, "x_dot", x)
    num_groups = check_integer(OP, "num_groups", num_groups, 1, 2**63 - 1)
    if channels % num_groups:
        raise ValueError(f"{OP}: num_groups must divide C = {channels}, got {num_groups}")
    weight, bias = (
        None if array is None else _check(array, name, x, (channels,))[0]
        for name, array in (("weight", weight), ("bias", bias))
    )
    if isinstance(eps, (str, bytes)) or not hasattr(eps, "__float__"):
        raise TypeError(f"{OP}: eps must be a real number, got {type(eps).__name__}")
    if not 0 <= float(eps) < math.inf:
        raise ValueError(f"{OP}: eps must lie in [0, inf), got {float(eps)}")
    if not isinstance(silu, bool):
        raise TypeError(f"{OP}: silu must be a bool, got {type(silu).__name__}")
    if residual is None and residual_dot is not None:
        raise ValueError(f"{OP}: residual must be given with residual_dot, got None")
    if residual is not None:
        residual = _same_dtype(_check(residual, "residual", x, x.shape)[0], "residual", x)
    if residual_dot is not None:
        residual_dot = _check_tangents(residual_dot, "residual_dot", x, len(x_dot))
    out = _OPERATOR(x, x_dot, num_groups, weight, bias, float(eps), silu, residual, residual_dot, backend)
    if residual is not None and residual_dot is None:
        out = [*out, x_dot]
    return GroupNormJvp(*map(restore, out))


def _check(array, name: str, x, shape):
    """A detached tensor of this shape on the device of x, and what turns a result back into the array's kind."""
    array, restore = arrays.to_torch(array, OP, name)
    if array.layout != torch.strided or array.is_nested:
        raise TypeError(f"{OP}: {name} must be a dense (strided) tensor")
    if x is not None and tuple(array.shape) != tuple(shape):
        raise ValueError(f"{OP}: {name} must have shape {list(shape)}, got {list(array.shape)}")
    if x is not None and array.device != x.device:
        raise ValueError(f"{OP}: {name} must be on {x.device} as x is, got {array.device}")
    if x is not None and array.dtype not in DTYPES:
        raise TypeError(f"{OP}: {name} must be float16, bfloat16, float32 or float64, got {array.dtype}")
    return array.detach(), restore


def _same_dtype(tensor, name: str, x):
    if tensor.dtype != x.dtype:
        raise TypeError(f"{OP}: {name} must be {x.dtype} as x is, got {tensor.dtype}")
    return tensor


def _check_tangents(array, name: str, x, count: int | None = None):
    """[K, *x.shape], of the dtype and device of x; K = count where that is given."""
    array, _ = arrays.to_torch(array, OP, name)
    if array.dim() != x.dim() + 1 or array.shape[1:] != x.shape or count not in (None, array.shape[0]):
        wanted = ", ".join(map(str, ("K" if count is None else count, *x.shape)))
        raise ValueError(f"{OP}: {name} must have shape [{wanted}], got {list(array.shape)}")
    return _same_dtype(_check(array, name, x, array.shape)[0], name, x)


# The operator as torch's dispatcher has it, so that compiled and traced programs hold one opaque call. It gives y, y_dot, and
# with a residual s, and with tangents of the residual s_dot.


def empty_like(x, channel: int, *lead: int):
    """Unwritten [*lead, *x.shape], channels-last where x is, otherwise contiguous."""
    last = x.movedim(channel, -1)
    if last.is_contiguous() and not x.is_contiguous():
        return last.new_empty((*lead, *last.shape)).movedim(-1, channel + len(lead))
    return x.new_empty((*lead, *x.shape))


def _outputs(x, x_dot, num_groups, weight, bias, eps, silu, residual, residual_dot, backend):
    like = [(x, 1), (x_dot, 2)] * (1 if residual is None else 2)
    return [empty_like(*one) for one in (like[:3] if residual is not None and residual_dot is None else like)]


def _run(x, x_dot, num_groups, weight, bias, eps, silu, residual, residual_dot, backend):
    constants = num_groups, weight, bias, eps, silu
    chosen = backends.choose(OP, backend, x)
    out = _outputs(x, x_dot, *constants, residual, residual_dot, backend)
    if x.numel() > 0:
        count = torch.Size(x.shape[2:]).numel()
        inputs = (None if a is None else a.reshape(*a.shape[: a.dim() - x.dim() + 2], count) for a in
                  (x, x_dot, residual, residual_dot))  # fmt: skip
        results = [a.view(*a.shape[: a.dim() - x.dim() + 2], count) for a in out]
        chosen.run(*inputs, *constants, results)
    return out


_LIBRARY.define(
    f"{OP}(Tensor x, Tensor x_dot, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? residual, "
    "Tensor? residual_dot, str? backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl(OP, _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"pyattr::{OP}", _outputs, lib=_LIBRARY)
_OPERATOR = torch.ops.pyattr.group_norm_silu_jvp.default


# Backends. All take x [B, C, L], x_dot [K, B, C, L], residual and residual_dot alike, num_groups to silu, and write to out.


def _run_reference(x, x_dot, residual, residual_dot, num_groups, weight, bias, eps, silu, out):
    results = reference.group_norm_silu_jvp(x, x_dot, num_groups, weight, bias, eps, silu, residual, residual_dot)
    for array, result in zip(out, results, strict=False):
        array.copy_(result)


def _unsupported(name: str):
    return lambda x: backends.placement_unsupported(name, x=x)


def _compiled_arguments(x, x_dot, residual, residual_dot, num_groups, weight, bias, eps, silu, out):
    """The arguments of the compiled kernels, and the arrays whose addresses are among them."""
    weight, bias = (None if a is None else a.to(torch.float32).contiguous() for a in (weight, bias))
    arrays = [x, x_dot, residual, residual_dot, *out, *[None] * (4 - len(out))]
    spans = [(0, (0,) * 4) if a is None else (a.data_ptr(), ((0,) * (4 - a.dim()) + a.stride())) for a in arrays]
    constants = (0 if a is None else a.data_ptr() for a in (weight, bias))
    return (PRECISIONS[x.dtype], (*x_dot.shape, num_groups), spans, *constants, eps, silu), (weight, bias)


def _run_cpu(*problem):
    arguments, _alive = _compiled_arguments(*problem)
    backends.extension().group_norm_silu_jvp_cpu(*arguments, threads.usable(torch.get_num_threads()))


def _run_cuda(x, *problem):
    arguments, _alive = _compiled_arguments(x, *problem)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    backends.extension().group_norm_silu_jvp_cuda(*arguments, stream, x.device.index)


def _run_triton(*problem):
    from ..triton_kernels.group_norm_silu_jvp import group_norm_silu_jvp as launch

    launch(*problem)


backends.register(
    OP,
    [
        Backend("reference", _run_reference, backends.always, lambda *_: []),
        Backend("cpu", _run_cpu, backends.cpu_unavailable("group_norm_silu_jvp_cpu"), _unsupported("cpu")),
        Backend("cuda", _run_cuda, backends.cuda_unavailable("group_norm_silu_jvp_cuda"), _unsupported("cuda")),
        Backend("triton", _run_triton, backends.triton_unavailable, _unsupported("triton")),
    ],
)
