"""A linear map and its transpose as two torch ops, each the other's derivative: autograd in both modes, vmap, tracing.

Everything goes through torch's dispatcher, so that ``torch.compile``, ``make_fx``, fake and meta tensors see one opaque op, and
tensors that are negated or zero only in name (``is_neg()``, ``torch._efficientzerotensor``) arrive written out.
"""

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from ._precision import full_float32

TYPES = {int: "SymInt", float: "float"}
_LIBRARY = torch.library.Library("pyattr", "FRAGMENT")


def register_pair(name: str, project, transpose, matrix: type):
    """The op ``pyattr::<name>`` and its transpose ``pyattr::<name>_transpose``.

    Args:
        name: of the op.
        project: ``(x [B, P], width D, *matrix, backend) -> [B, D]``.
        transpose: the same for the transpose, ``[B, D], width P -> [B, P]``.
        matrix: the named tuple whose fields are the parameters in between.

    Both give float64 for float64 and float32 for everything else. A transpose may end in a library's matmul: autocast and TF32
    are off in it.
    """

    def exact_transpose(x, *arguments):
        with full_float32(x.device):
            return transpose(x, *arguments)

    parameters = ", ".join(f"{TYPES[kind]} {field}" for field, kind in matrix.__annotations__.items())
    schema = f"(Tensor x, SymInt width, {parameters}, str? backend) -> Tensor"
    for op, kernel in ((name, project), (f"{name}_transpose", exact_transpose)):
        _LIBRARY.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyattr::{op}", _fake, lib=_LIBRARY)
    forward, backward = (getattr(torch.ops.pyattr, op).default for op in (name, f"{name}_transpose"))
    for op, other in ((forward, backward), (backward, forward)):
        _LIBRARY.impl(op, _differentiable(op, other), "Autograd")
        torch.library.register_vmap(op, _batched(op), lib=_LIBRARY)
    return forward, backward


def _fake(x, width, *_):
    return x.new_empty((x.shape[0], width), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _differentiable(op, transpose):
    def kernel(x, width, *matrix):
        # Past torch.func's check: the dispatcher calls this once for each of its levels, as it calls a built-in op.
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, _Linear).apply(x, op, transpose, width, *matrix)

    return kernel


def _batched(op):
    def rule(info, in_dims, x, width, *matrix):
        x = x.movedim(in_dims[0], 0)  # [V, B, P]
        return op(x.flatten(0, 1), width, *matrix).unflatten(0, x.shape[:2]), 0

    return rule


class _Linear(torch.autograd.Function):
    """Linear in x, so the tangent rule is the op itself and the cotangent rule its transpose."""

    @staticmethod
    def forward(x, op, transpose, width, *matrix):
        with torch._C._AutoDispatchBelowAutograd():
            if not torch._C._are_functorch_transforms_active():
                return op(x, width, *matrix)
            # Function turned both modes off; the outer levels of torch.func must still differentiate.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                return op(x, width, *matrix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.op, ctx.transpose, ctx.width, *ctx.matrix = inputs
        ctx.in_width, ctx.dtype = x.shape[1], x.dtype

    @staticmethod
    def backward(ctx, out_bar):
        x_bar = ctx.transpose(out_bar, ctx.in_width, *ctx.matrix).to(ctx.dtype)
        return x_bar, None, None, None, *([None] * len(ctx.matrix))

    @staticmethod
    def jvp(ctx, x_dot, *_):
        return ctx.op(x_dot, ctx.width, *ctx.matrix)
