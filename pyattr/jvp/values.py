"""What leaves the pass: numbers that Python reads are the primal's; arrays and autograd's graph would lose the tangents."""

import torch
from torch import Tensor

from .dual import Run
from .rule import function_rule
from .where import Refusal, current_function, has_own_jvp, here


@function_rule(Tensor.tolist)
def numbers(run: Run, x):
    return x.primal.tolist()


@function_rule(Tensor.__format__)
def text(run: Run, x, specification):
    return format(x.primal, specification)


@function_rule(Tensor.numpy)
@function_rule(Tensor.__array__)
def array(run: Run, x, *settings, **options):
    kind = Refusal if has_own_jvp(current_function()) else NotImplementedError
    raise kind(
        f"dual_forward: numpy{here(run)} takes a value that depends on x out of torch; detach it if it is a constant"
    )


@function_rule(torch.autograd.grad)
def gradient(run: Run, *settings, **options):
    # The graph keeps detached values, and rules of whole functions are not in it.
    raise Refusal(f"dual_forward: torch.autograd.grad{here(run)} differentiates a value that depends on x")


@function_rule(torch.autograd.backward)
@function_rule(Tensor.backward)
def backward(run: Run, *settings, **options):
    raise NotImplementedError(
        f"dual_forward: backward{here(run)} differentiates a value that depends on x; use torch.func.grad instead"
    )
