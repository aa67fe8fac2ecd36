"""The projections as torch sees them: compiled, traced, on fake tensors, and on tensors that are not what their memory says."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from pyattr import ops, testing

# The parameters that an op has beside seed and scale, and the arguments of its registered form between stream and scale.
PIECE = {"column_offset": 100}
OPTIONS = {
    "rademacher_project": (PIECE, (3,)),
    "gaussian_project": (PIECE, (3,)),
    "hadamard_project": ({}, ()),
    "mask_project": (PIECE | {"num_columns": 300}, (3, 400)),
    "sparse_project": (PIECE | {"num_columns": 1000}, (3, 2)),
}
OPS = tuple(OPTIONS)
BACKENDS = testing.usable_backends("rademacher_project")
COMPILERS = ("eager", "aot_eager")  # inductor would want a C++ compiler at test time; what it is handed is the same


@pytest.fixture(params=OPS)
def project(request):
    function, (own, _) = getattr(ops, request.param), OPTIONS[request.param]

    def call(grads, **options):
        if (request.param, options.get("backend")) == ("mask_project", "triton"):
            pytest.skip("mask_project has no Triton kernel")
        return function(grads, 6, seed=3, scale=0.5, **own, **options)

    return call


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("op", [*OPS, *(f"{op}_transpose" for op in OPS)])
def test_library_registration(op):
    _, own = OPTIONS[op.removesuffix("_transpose")]
    width = 300 if op.endswith("_transpose") else 8
    arguments = (torch.randn(3, 200, requires_grad=True), width, 1, 2, *own, 0.5, "reference")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.pyattr, op).default, arguments, test_utils=checks)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_reverse_mode_without_graph_breaks(project, compiler):
    def function(g):
        return project(g * 2).square().sum()

    grads = torch.randn(3, 200, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(grads), function(grads))
    (bar,) = torch.autograd.grad(compiled(grads), grads)
    (expected,) = torch.autograd.grad(function(grads), grads)
    torch.testing.assert_close(bar, expected)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_forward_mode(project, compiler):
    def tangent(x, x_dot):
        return torch.func.jvp(project, (x,), (x_dot,))[1]

    x, x_dot = torch.randn(2, 3, 200)
    compiled = torch.compile(tangent, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(x, x_dot), project(x_dot))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x_dot)
        out = torch.compile(project, fullgraph=True, backend=compiler)(dual)
        assert torch.equal(forward_ad.unpack_dual(out).tangent, project(x_dot))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_transforms_of_torch_func(project, compiler):
    def bar(x):
        return torch.func.grad(lambda g: project(g).pow(3).sum())(x)

    def bar_dot(x, x_dot):  # forward over reverse
        return torch.func.jvp(bar, (x,), (x_dot,))[1]

    x, x_dot = torch.randn(2, 3, 200)
    for function, arguments in (
        (bar, (x,)),
        (bar_dot, (x, x_dot)),
        (torch.func.vmap(project), (torch.stack([x, x_dot]),)),
        (torch.func.vmap(project, in_dims=2), (torch.stack([x, x_dot], 2),)),
    ):
        expected = function(*arguments)
        assert expected.abs().max() > 0
        torch.testing.assert_close(torch.compile(function, backend=compiler)(*arguments), expected)


def test_derivatives_by_torch_func_nest(project):
    x, x_dot = torch.randn(2, 3, 200)
    (forward_over_reverse,) = torch.func.jvp(torch.func.grad(lambda g: project(g).pow(3).sum()), (x,), (x_dot,))[1:]
    y, y_dot = project(x), project(x_dot)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(project(leaf), leaf, 6 * y * y_dot)
    torch.testing.assert_close(forward_over_reverse, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
def test_traced_graphs_hold_the_op(project, mode):
    grads = torch.randn(3, 200)
    for function in (project, lambda g: torch.autograd.grad(project(g.requires_grad_()).pow(3).sum(), g)[0]):
        graph = make_fx(function, tracing_mode=mode)(grads.clone())
        other = torch.randn(3, 200)
        torch.testing.assert_close(graph(other.clone()), function(other.clone()).detach())


@pytest.mark.parametrize("device", ("fake", "meta"))
def test_shapes_without_data(project, device):
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        with FakeTensorMode() if device == "fake" else torch.device("meta"):
            grads = torch.empty(3, 200, dtype=dtype, requires_grad=True)
            out = project(grads)
            (bar,) = torch.autograd.grad(out.sum(), grads)
        assert out.shape == (3, 6) and out.dtype == wanted and out.device == grads.device
        assert bar.shape == (3, 200) and bar.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_negated_or_zero_only_in_name(project, backend):
    values = torch.randn(3, 200, dtype=torch.complex64, device=testing.device_of(backend))
    negated = values.conj().imag
    assert negated.is_neg()
    assert torch.equal(project(negated, backend=backend), project(negated.resolve_neg(), backend=backend))
    zeros = torch._efficientzerotensor((3, 200), device=values.device)
    assert torch.equal(project(zeros, backend=backend), torch.zeros(3, 6, device=values.device))
    _, tangent = torch.func.jvp(lambda g: project(g, backend=backend), (values.real,), (negated,))
    assert torch.equal(tangent, project(-values.imag, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_torchs_defaults_change_nothing(project, backend, dtype):
    grads = torch.randn(3, 200, device=testing.device_of(backend)).requires_grad_()

    def results():
        out = project(grads, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), grads), ops.sign_matrix([0, 3], range(5), 1)

    expected = results()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_autocast_does_not_reach_the_transpose(op):
    """A backward pass inside of autocast: the rows that a library multiplies stay float32."""
    _, own = OPTIONS[op]
    transpose = getattr(torch.ops.pyattr, f"{op}_transpose").default
    arguments = (torch.randn(3, 200), 300, 1, 2, *own, 0.5, None)
    expected = transpose(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transpose(*arguments), expected)
