"""What Python reads of a tensor: numbers, as item() gives them, are the primal's; arrays would lose the tangents."""

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
