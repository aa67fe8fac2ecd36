"""One forward pass of a module that carries many tangents."""

import contextlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch as dispatch  # it tells duals what to do
from .dual import Dual, Run
from .fallback import Draws
from .where import Refusal
from .whole import Plan

OP = "dual_forward"


def dual_forward(module: Callable, x: Tensor, x_dot: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """A module's output and its derivatives along K directions, in one forward pass.

    ``y = module(x, *args, **kwargs)``,  ``y_dot[k] = d module(x + e x_dot[k], *args, **kwargs) / d e`` at e = 0. Only x
    has tangents: the module's parameters, buffers and other arguments are constants.

    The module runs as it is, hooks included, on a tensor that stands for the primal and its K tangents; each operator that
    it comes to is done by a rule on all of them at once (a convolution is one library call on (K + 1) B images; group
    normalisation and the SiLU behind it are one pass). Operators without a rule are done by ``torch.func.jvp``, and a
    warning says so once for each. Where an operator cannot be followed by itself (it writes to a tensor that does not
    depend on x, say), the innermost module around it for which that works is done by ``torch.func.jvp`` as a whole, once
    for each tangent, and a warning says so once; to find it, the first such call runs the module again from its start.
    Dropout in training mode draws one mask for primal and tangents. TorchScript modules work; compiled ones run as they
    were before compilation. A ``torch.autograd.Function`` is differentiated through its forward as it is written; only
    where that detaches or cannot be followed, its own jvp is asked. Its backward never is. Elsewhere ``detach`` ends a
    tangent, as in torch. Decisions that the module makes on values (``if``, ``item``, ``tolist``, comparisons) see the
    primal. Derivatives that the module itself takes are followed where they are ``torch.func``'s; ``torch.autograd.grad``
    and ``backward`` are refused.

    Args:
        module: a torch module or any other callable. It may return a tensor, a diffusers model output (of which ``sample``
            is taken), or one tensor in a tuple.
        x: [*shape] float16, bfloat16, float32 or float64, the module's first argument; any strides. Not changed, even
            by a module that works in place.
        x_dot: [K, *shape] tangents of x, of its dtype and device; K may be 0.
        args, kwargs: for the module, after x.

    Returns:
        ``y`` [*out] and ``y_dot`` [K, *out], without a graph. A module that gives the same bits for one image and for many
        gives the same y_dot[k] whatever the other tangents; torch's convolutions and products agree to rounding. Linear in
        x_dot to rounding; a tangent of zeros gives zeros where all slopes are finite.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: an operator has neither a rule nor a forward derivative in torch, or writes in place in a way
            that cannot be followed, and no module around it can be done as a whole; the message names the part of the module
            that it is in.

    Extra memory: while the module runs, K tangents of every activation that is alive, which are K + 1 times what inference
    takes; nothing is kept for a backward pass.

    Source: forward mode with the chain rule operator by operator, as in Griewank and Walther, "Evaluating Derivatives",
    2008, section 3.1 (vector mode).
    """
    _check(module, x, x_dot)
    plan, draws = Plan(module), Draws(x.device)
    with torch.inference_mode(False), torch.no_grad(), _not_compiled():
        while True:
            run = Run(len(x_dot), module)
            stack = torch.cat([x.detach()[None], x_dot.detach()])
            try:
                outcome = _outcome(run, plan.call(run, (Dual(run, (stack,)), *args), kwargs))
                plan.done()
                return outcome
            except Refusal as refusal:
                plan.add(refusal)
                draws.again()
            finally:
                run.open = False


def _check(module, x, x_dot):
    if not callable(module):
        raise TypeError(f"{OP}: module must be a torch module or another callable, got {type(module).__name__}")
    for name, tensor in (("x", x), ("x_dot", x_dot)):
        if not isinstance(tensor, Tensor) or isinstance(tensor, Dual):
            raise TypeError(f"{OP}: {name} must be a torch tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{OP}: {name} must be a dense (strided) tensor")
    if not x.is_floating_point():
        raise TypeError(f"{OP}: x must be floating point, got {x.dtype}")
    if x_dot.dim() != x.dim() + 1 or x_dot.shape[1:] != x.shape:
        wanted = ", ".join(map(str, ("K", *x.shape)))
        raise ValueError(f"{OP}: x_dot must have shape [{wanted}], got {list(x_dot.shape)}")
    if x_dot.dtype != x.dtype:
        raise TypeError(f"{OP}: x_dot must be {x.dtype} as x is, got {x_dot.dtype}")
    if x_dot.device != x.device:
        raise ValueError(f"{OP}: x_dot must be on {x.device} as x is, got {x_dot.device}")


def _not_compiled():
    """Compiled modules run as they were written: a compiler sees no tangents."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _outcome(run: Run, result) -> tuple[Tensor, Tensor]:
    value = getattr(result, "sample", result) if not isinstance(result, Tensor) else result
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{OP}: module must return a tensor, a model output with a sample, or one tensor in a tuple, "
            f"got {type(result).__name__}"
        )
    if isinstance(value, Dual):
        return value.primal, value.tangents
    return value, value.new_zeros((run.count, *value.shape))
