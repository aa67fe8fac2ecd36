"""group_norm_silu_jvp in Triton without a GPU: compiled for one, and run by Triton's interpreter in a child process."""

import pytest
import torch
from triton_without_gpu import compile_for_gpu, interpreted, not_interpreted, run_interpreted

from pyattr.ops import group_norm_silu_jvp

EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@not_interpreted
def test_under_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("ones", [False, True], ids=["ordinary", "specialised to sizes of 1"])
def test_compiles_for_a_gpu(held, ones):
    from pyattr.triton_kernels import group_norm_silu_jvp as kernels

    kernel = kernels.group_norm_silu_jvp_kernel
    own = {"SILU": True, "X_LAST": held, "DOT_LAST": ones, "HELD": held, "BLOCK": 1024}
    if ones:
        own |= dict.fromkeys(("residual_ptr", "residual_dot_ptr", "weight_ptr", "bias_ptr", "sum_ptr", "sum_dot_ptr"))
    types = {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {"weight_ptr": "*fp32", "bias_ptr": "*fp32", "eps": "fp32"}
    compile_for_gpu(kernel, types, own, ("num_tangents", "share", "num_groups") if ones else None, num_warps=8)


@pytest.fixture
def cut(request, monkeypatch):
    """Groups of more than 16 elements take several blocks."""
    if request.param:
        from pyattr.triton_kernels import group_norm_silu_jvp as kernels

        monkeypatch.setattr(kernels, "HELD_ELEMENTS", 16)
        monkeypatch.setattr(kernels, "BLOCK", 16)


def problem(shape, tangents, dtype=torch.float32, residual=True):
    given = {"x": torch.randn(shape) + 2, "x_dot": torch.randn(tangents, *shape) + 1}
    if residual:
        given |= {"residual": torch.randn(shape), "residual_dot": torch.randn(tangents, *shape)}
    given = {name: array.to(dtype) for name, array in given.items()}
    return given | {"weight": 1 + torch.randn(shape[1]) / 4, "bias": torch.randn(shape[1]) / 4}


def run(given, num_groups, backend="triton", **options):
    given = dict(given)
    return group_norm_silu_jvp(given.pop("x"), given.pop("x_dot"), num_groups, backend=backend, **given, **options)


def channels_last(array):
    return array.movedim(-3, -1).contiguous().movedim(-1, -3)


@interpreted
@pytest.mark.parametrize("cut", [False, True], indirect=True, ids=["held", "looped"])
@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "residual"),
    [
        ((2, 4, 3, 5), 2, torch.float32, True),
        ((1, 4), 1, torch.float32, False),
        ((1, 1, 33), 1, torch.bfloat16, True),
        ((1, 2, 9), 1, torch.float16, False),
    ],
    ids=str,
)
def test_values(cut, shape, groups, dtype, residual):
    given = problem(shape, 3, dtype, residual)
    wide = {name: array.double() for name, array in given.items()}
    for silu in (True, False):
        out = run(given, groups, silu=silu, eps=0.01)
        wanted = run(wide, groups, "reference", silu=silu, eps=0.01)
        for found, expected in zip(out, wanted, strict=True):
            if found is not None:
                assert found.dtype == dtype
                tolerance = EPS[dtype] + 2e-6
                assert (found.double() - expected).norm() <= tolerance * expected.norm()


@interpreted
@pytest.mark.parametrize("cut", [False, True], indirect=True, ids=["held", "looped"])
def test_layouts(cut):
    given = problem((1, 6, 3, 5), 2)
    expected = run(given, 3)
    names = ("x", "x_dot", "residual", "residual_dot")
    last = {name: channels_last(given[name]) for name in names}
    strided = {name: torch.stack([given[name]] * 2, -1)[..., 1] for name in names}
    mixed = last | {"x": given["x"], "residual_dot": given["residual_dot"]}
    for kind in (last, strided, mixed):
        for found, wanted, like in zip(run(given | kind, 3), expected, (kind["x"], kind["x_dot"]) * 2, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
            assert kind is strided or found.stride() == like.stride()


@interpreted
@pytest.mark.parametrize("cut", [False, True], indirect=True, ids=["held", "looped"])
def test_bits_do_not_depend_on_the_tangents_beside(cut, monkeypatch):
    """Nor on how many of them a program takes."""
    from pyattr.triton_kernels import group_norm_silu_jvp as kernels

    given = problem((1, 4, 9), 4)
    out = run(given, 2)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    assert all(torch.equal(a, b) for a, b in zip(run(given, 2), out, strict=True))
    one = run(given | {name: given[name][3:4] for name in ("x_dot", "residual_dot")}, 2)
    assert torch.equal(one.y, out.y) and torch.equal(one.y_dot[0], out.y_dot[3])


@interpreted
@pytest.mark.parametrize("cut", [False, True], indirect=True, ids=["held", "looped"])
def test_zeros_constants_and_what_is_not_finite(cut):
    given = problem((2, 4, 9), 3, residual=False)
    given["x_dot"][1] = 0
    given["x"][1, :2] = 1234.5
    clean = run(given, 2)
    assert torch.equal(clean.y_dot[1], torch.zeros(2, 4, 9))
    bias = given["bias"][:2, None].expand(2, 9)
    torch.testing.assert_close(clean.y[1, :2], torch.nn.functional.silu(bias), rtol=1e-3, atol=1e-3)
    given["x"][0, 1, 8] = torch.nan
    out = run(given, 2)
    assert out.y[0, :2].isnan().all() and out.y_dot[:, 0, :2].isnan().all()
    assert torch.equal(out.y[0, 2:], clean.y[0, 2:]) and torch.equal(out.y_dot[:, 1], clean.y_dot[:, 1])


@interpreted
@pytest.mark.parametrize("cut", [False, True], indirect=True, ids=["held", "looped"])
@pytest.mark.parametrize("last", [False, True])
def test_results_that_are_parts_of_larger_arrays(cut, last, monkeypatch):
    """As forward mode asks where each image has a scale of its own."""
    from pyattr.jvp.norm import GroupNorm

    monkeypatch.setenv("PYATTR_BACKEND", "triton")
    given = problem((2, 4, 3, 5), 3, residual=False)
    x, x_dot = (channels_last(given[name]) if last else given[name] for name in ("x", "x_dot"))
    scales, shifts = torch.randn(2, 2, 4)
    (stack,) = GroupNorm(x, x_dot, 2, scales, shifts, 1e-5).compute(silu=True)
    for i in range(2):
        one = {"x": x[i : i + 1], "x_dot": x_dot[:, i : i + 1], "weight": scales[i], "bias": shifts[i]}
        wanted = run(one, 2, "reference")
        torch.testing.assert_close(stack[0, i], wanted.y[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stack[1:, i], wanted.y_dot[:, 0], rtol=1e-5, atol=1e-5)


@interpreted
def test_no_tangents():
    given = problem((2, 4, 5), 0)
    out = run(given, 2)
    assert out.y_dot.shape == (0, 2, 4, 5)
    torch.testing.assert_close(out.y, run(given, 2, "reference").y, rtol=1e-5, atol=1e-6)
