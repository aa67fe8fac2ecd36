"""group_norm_silu_jvp as torch sees it (registered, compiled, traced, on fake tensors), and the errors that it raises."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyattr import backends, testing
from pyattr.ops import group_norm_silu_jvp

X, V = torch.zeros(2, 6, 5), torch.zeros(3, 2, 6, 5)


def arrays(*shape, tangents=3, dtype=torch.float32, seed=0):
    """x, residual and their tangents, weight."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    given = {"x": random(*shape), "x_dot": random(tangents, *shape)}
    return given | {"residual": random(*shape), "residual_dot": random(tangents, *shape), "weight": random(shape[1])}


def run(given, num_groups, backend=None):
    given = dict(given)
    return group_norm_silu_jvp(given.pop("x"), given.pop("x_dot"), num_groups, backend=backend, **given)


def test_library_registration():
    given = arrays(2, 6, 5)
    ends = given["residual"], given["residual_dot"], "reference"
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.pyattr.group_norm_silu_jvp.default
    for tail in (ends, (given["residual"], None, "reference"), (None, None, "reference")):
        arguments = (given["x"], given["x_dot"], 3, given["weight"], None, 1e-5, True, *tail)
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("compiler", ("eager", "aot_eager"))
def test_compiled_without_graph_breaks(compiler):
    def function(x, x_dot, weight, residual):
        out = group_norm_silu_jvp(x * 2, x_dot * 2, 3, weight, residual=residual)
        return out.y + out.sum, out.y_dot + out.sum_dot

    torch._dynamo.reset()
    given = arrays(2, 6, 5, 4)
    arguments = given["x"], given["x_dot"], given["weight"], given["residual"]
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), function(*arguments), strict=True))


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
def test_traced_graphs_hold_the_op(mode):
    given = arrays(2, 6, 5)
    graph = make_fx(lambda x, v: group_norm_silu_jvp(x, v, 3).y_dot, tracing_mode=mode)(given["x"], given["x_dot"])
    other = arrays(2, 6, 5, seed=1)
    assert torch.equal(graph(other["x"], other["x_dot"]), group_norm_silu_jvp(other["x"], other["x_dot"], 3).y_dot)


def channels_last(array):
    return array.movedim(-3, -1).contiguous().movedim(-1, -3)


@pytest.mark.parametrize("device", ("fake", "meta"))
@pytest.mark.parametrize("last", [False, True])
def test_shapes_without_data(device, last):
    real = arrays(2, 6, 5, 4, dtype=torch.bfloat16)
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        given = {name: torch.empty(a.shape, dtype=a.dtype) for name, a in real.items()}
        if last:
            given = {name: a if a.dim() == 1 else channels_last(a) for name, a in given.items()}
        out = run(given, 3)
    if last:
        real = {name: a if a.dim() == 1 else channels_last(a) for name, a in real.items()}
    for found, wanted in zip(out, run(real, 3), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def test_tensors_that_are_negated_or_zero_only_in_name():
    values = torch.randn(2, 6, 5, dtype=torch.complex64)
    negated = values.conj().imag
    x_dot = torch.randn(3, 2, 6, 5)
    assert negated.is_neg()
    assert torch.equal(group_norm_silu_jvp(negated, x_dot, 3).y, group_norm_silu_jvp(-values.imag, x_dot, 3).y)
    zeros = torch._efficientzerotensor((3, 2, 6, 5))
    assert torch.equal(group_norm_silu_jvp(values.real, zeros, 3).y_dot, torch.zeros(3, 2, 6, 5))


BAD = [
    ({"x": [1.0]}, TypeError, "x must be a torch tensor, NumPy array or CuPy array, got list"),
    ({"x": torch.zeros(3)}, ValueError, "x must have shape [B, C, *S], got [3]"),
    ({"x": X.int()}, TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"x": X.to_sparse()}, TypeError, "x must be a dense (strided) tensor"),
    ({"x_dot": X}, ValueError, "x_dot must have shape [K, 2, 6, 5], got [2, 6, 5]"),
    ({"x_dot": V[:, :, :3]}, ValueError, "x_dot must have shape [K, 2, 6, 5], got [3, 2, 3, 5]"),
    ({"x_dot": V.double()}, TypeError, "x_dot must be torch.float32 as x is, got torch.float64"),
    ({"x_dot": V.to("meta")}, ValueError, "x_dot must be on cpu as x is, got meta"),
    ({"num_groups": 4}, ValueError, "num_groups must divide C = 6, got 4"),
    ({"num_groups": 0}, ValueError, "num_groups must lie in [1, 9223372036854775807], got 0"),
    ({"num_groups": 2.0}, TypeError, "num_groups must be an integer, got float"),
    ({"weight": torch.ones(5)}, ValueError, "weight must have shape [6], got [5]"),
    ({"bias": torch.ones(6).int()}, TypeError, "bias must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"eps": -1e-5}, ValueError, "eps must lie in [0, inf), got -1e-05"),
    ({"eps": math.nan}, ValueError, "eps must lie in [0, inf), got nan"),
    ({"eps": "1"}, TypeError, "eps must be a real number, got str"),
    ({"silu": 1}, TypeError, "silu must be a bool, got int"),
    ({"residual": V}, ValueError, "residual must have shape [2, 6, 5], got [3, 2, 6, 5]"),
    ({"residual": X.half()}, TypeError, "residual must be torch.float32 as x is, got torch.float16"),
    ({"residual_dot": V}, ValueError, "residual must be given with residual_dot, got None"),
    ({"residual": X, "residual_dot": V[:2]}, ValueError, "residual_dot must have shape [3, 2, 6, 5], got [2, 2, 6, 5]"),
    ({"backend": "gpu"}, ValueError, "backend must be one of cuda, triton, cpu, reference, got 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_errors(change, error, message):
    given = {"x": X, "x_dot": V, "num_groups": 3} | change
    with pytest.raises(error) as caught:
        group_norm_silu_jvp(given.pop("x"), given.pop("x_dot"), given.pop("num_groups"), **given)
    assert str(caught.value) == f"group_norm_silu_jvp: {message}"


def test_float64_is_refused_by_the_kernels():
    if "cpu" in testing.usable_backends("group_norm_silu_jvp"):
        with pytest.raises(
            backends.BackendError, match=r"x is torch\.float64, this backend takes float16, bfloat16 and"
        ):
            group_norm_silu_jvp(X.double(), V.double(), 3, backend="cpu")
