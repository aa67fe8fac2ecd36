"""Group normalisation with SiLU in forward mode, on every usable backend: values, structure, layouts, bits, errors."""

import hashlib
import math
import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pyattr import backends, testing
from pyattr.ops import GroupNormJvp, group_norm_silu_jvp

BACKENDS = testing.usable_backends("group_norm_silu_jvp")
KERNELS = [name for name in BACKENDS if name != "reference"]
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def plain(s, num_groups, weight=None, bias=None, eps=1e-5, silu=True):
    """Plain operators of torch, which it differentiates."""
    t = s.reshape(s.shape[0], num_groups, -1)
    t = (t - t.mean(2, keepdim=True)) / (t.var(2, unbiased=False, keepdim=True) + eps).sqrt()
    y = t.reshape(s.shape)
    view = (-1, *[1] * (s.dim() - 2))
    y = y if weight is None else y * weight.view(view)
    y = y if bias is None else y + bias.view(view)
    return y * torch.sigmoid(y) if silu else y


def problem(shape, tangents=3, dtype=torch.float32, residual=False, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    given = {"x": random(*shape) + 0.5, "x_dot": random(tangents, *shape) + 0.25}
    given |= {"weight": 1 + random(shape[1]) / 4, "bias": random(shape[1]) / 4}
    if residual:
        given |= {"residual": random(*shape), "residual_dot": random(tangents, *shape)}
    return {name: array.to(dtype).to(device) for name, array in given.items()}


def exact(given, num_groups, **options):
    """y, y_dot, s and s_dot by torch.func.jvp in float64."""
    given = {name: None if a is None else a.cpu().double() for name, a in given.items()}
    s, s_dot = given["x"], given["x_dot"]
    if given.get("residual") is not None:
        s = s + given["residual"]
    if given.get("residual_dot") is not None:
        s_dot = s_dot + given["residual_dot"]

    def function(a):
        return plain(a, num_groups, given.get("weight"), given.get("bias"), **options)

    y_dot = torch.stack([torch.func.jvp(function, (s,), (v,))[1] for v in s_dot]) if len(s_dot) else s_dot
    return function(s), y_dot, s, s_dot


def run(given, num_groups, backend, **options):
    given = dict(given)
    return group_norm_silu_jvp(given.pop("x"), given.pop("x_dot"), num_groups, backend=backend, **given, **options)


def assert_near(found, wanted, tolerance):
    """Of the norm; and of an element, where what it is made of is no larger than the largest."""
    found = found.cpu().double()
    assert (found - wanted).norm() <= tolerance * wanted.norm()
    assert (found - wanted).abs().max() <= 8 * tolerance * wanted.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """One group [-1, -1, 1, 1]: mean 0, variance 1, xhat = x; logistic(+-ln 3) = 3/4 and 1/4."""
    device = testing.device_of(backend)
    x = torch.tensor([[[-1.0, -1.0, 1.0, 1.0]]], device=device)
    x_dot = torch.tensor(
        [[[[1.0, 0.0, 0.0, 0.0]]], [[[1.0, 1.0, 1.0, 1.0]]], [[[-1.0, -1.0, 1.0, 1.0]]]], device=device
    )
    log3 = math.log(3)
    weight, bias = torch.tensor([log3], device=device), torch.tensor([1.0], device=device)
    y, y_dot, *rest = group_norm_silu_jvp(x, x_dot, 1, 2 * weight / log3, bias, eps=0.0, silu=False, backend=backend)
    assert rest == [None, None]
    assert torch.equal(y.cpu(), torch.tensor([[[-1.0, -1.0, 3.0, 3.0]]]))
    assert torch.equal(y_dot[:, 0, 0].cpu(), torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4]))
    y, y_dot, *_ = group_norm_silu_jvp(x, x_dot, 1, weight, eps=0.0, backend=backend)
    near = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(y[0, 0].cpu(), torch.tensor([-log3 / 4, -log3 / 4, 0.75 * log3, 0.75 * log3]), **near)
    low = 0.25 * (1 - 0.75 * log3) * log3
    torch.testing.assert_close(y_dot[0, 0, 0].cpu(), torch.tensor([0.5 * low, -0.5 * low, 0.0, 0.0]), **near)


# Positions in a row and not, groups of one channel and of all, elements around and above a step of 32 and a run of 512.
SHAPES = [
    ((2, 6, 3, 5), 3), ((1, 4, 33), 4), ((3, 4, 7, 2, 3), 1), ((2, 12), 2), ((1, 32, 4, 4), 8), ((2, 2, 700), 2),
    ((1, 3, 40, 41), 1),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_against_torch_func(backend, dtype, residual, shape, num_groups):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    given = problem(shape, 3, dtype, residual, testing.device_of(backend))
    for silu in (True, False):
        out = run(given, num_groups, backend, silu=silu)
        wanted = exact(given, num_groups, silu=silu)
        assert all(a.dtype == dtype and a.device == given["x"].device for a in out[: 4 if residual else 2])
        # The sums of n elements, xhat and the exponential, in float32; then the result's own rounding.
        tolerance = 1e-13 if dtype == torch.float64 else EPS[dtype] + 2e-6
        for found, expected in zip(out, wanted, strict=True):
            if found is not None:
                assert_near(found, expected, tolerance)
        assert (out.sum is None) == (out.sum_dot is None) == (not residual)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", ["weight", "bias", "both", "residual_dot"])
def test_what_is_not_given(backend, missing):
    given = problem((2, 6, 9), 3, residual=missing == "residual_dot", device=testing.device_of(backend))
    for name in ("weight", "bias") if missing == "both" else (missing,):
        given[name] = None
    out = run(given, 2, backend, eps=1e-3)
    y, y_dot, s, _ = exact(given, 2, eps=1e-3)
    assert_near(out.y, y, 2e-6)
    assert_near(out.y_dot, y_dot, 2e-6)
    if missing == "residual_dot":
        assert_near(out.sum, s, 1e-7)
        assert out.sum_dot is given["x_dot"] or torch.equal(out.sum_dot, given["x_dot"])


def test_central_differences():
    given = problem((2, 6, 5), 2, torch.float64)
    out = run(given, 3, "reference")
    step = 1e-5
    for k in range(2):
        ends = [run(given | {"x": given["x"] + sign * step * given["x_dot"][k]}, 3, "reference").y for sign in (1, -1)]
        torch.testing.assert_close(out.y_dot[k], (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adjoint(backend):
    given = problem((2, 8, 6, 5), 4, device=testing.device_of(backend))
    out = run(given, 4, backend)
    x = given["x"].cpu().double().requires_grad_()
    u = torch.randn(x.shape, dtype=torch.float64)
    (bar,) = torch.autograd.grad(plain(x, 4, given["weight"].cpu().double(), given["bias"].cpu().double()), x, u)
    v = given["x_dot"].cpu().double()
    found, wanted = (u * out.y_dot.cpu().double()).flatten(1).sum(1), (bar * v).flatten(1).sum(1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(u.norm() * out.y_dot[0].norm()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_in_the_tangents(backend):
    given = problem((1, 8, 6, 5), 2, device=testing.device_of(backend))
    both = given["x_dot"][0] * 2 - given["x_dot"][1] * 0.5
    y_dot = run(given | {"x_dot": torch.cat([given["x_dot"], both[None]])}, 2, backend).y_dot.double()
    assert_near(y_dot[2], (y_dot[0] * 2 - y_dot[1] * 0.5).cpu(), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_large_offset_costs_no_more_than_its_own_rounding(backend, scale):
    given = problem((2, 4, 300), 2, device=testing.device_of(backend))
    given["x"] = given["x"] * scale + 1000 * scale
    out, wanted = run(given, 2, backend, eps=0.0), exact(given, 2, eps=0.0)
    assert_near(out.y, wanted[0], 5e-6)
    assert_near(out.y_dot, wanted[1], 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_constant_groups_and_groups_of_one(backend, size):
    """xhat = 0, so that y is SiLU of the bias and the derivative silu'(bias) weight / sqrt(eps) (t - mean t)."""
    device = testing.device_of(backend)
    x = torch.full((1, 2, size), 123.4, device=device)
    x_dot = torch.randn(2, 1, 2, size).to(device)
    weight, bias = torch.tensor([2.0, 3.0], device=device), torch.tensor([0.5, -0.5], device=device)
    out = group_norm_silu_jvp(x, x_dot, 2, weight, bias, eps=1e-2, backend=backend)
    b, w = bias.cpu().double(), weight.cpu().double()
    share = torch.sigmoid(b)
    torch.testing.assert_close(out.y.cpu().double(), (b * share)[None, :, None].expand(1, 2, size), rtol=1e-4, atol=0)
    t = x_dot.cpu().double()
    slope = (share * (1 + b * (1 - share)) * w * 10)[None, None, :, None]
    torch.testing.assert_close(out.y_dot.cpu().double(), slope * (t - t.mean(3, keepdim=True)), rtol=1e-4, atol=1e-5)
    if size == 1:
        assert torch.equal(out.y_dot.cpu(), torch.zeros(2, 1, 2, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_zero_tangents_give_zeros(backend, dtype):
    given = problem((2, 6, 35), 3, dtype, True, testing.device_of(backend))
    given["x_dot"][1] = 0
    given["residual_dot"][1] = 0
    y_dot = run(given, 3, backend).y_dot
    assert torch.equal(y_dot[1], torch.zeros_like(y_dot[1])) and y_dot[0].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(backend, bad):
    given = problem((2, 6, 35), 3, device=testing.device_of(backend))
    clean = run(given, 3, backend)
    given["x"][1, 2, 34] = bad  # sample 1, group 1
    given["x_dot"][2, 0, 5, 0] = bad  # tangent 2, sample 0, group 2
    out = run(given, 3, backend)
    hit = torch.zeros(2, 6, 35, dtype=torch.bool, device=out.y.device)
    hit[1, 2:4] = True
    hits = hit.expand(3, 2, 6, 35)
    assert out.y[hit].isnan().all() and out.y_dot[hits].isnan().all()
    assert torch.equal(out.y[~hit], clean.y[~hit])
    assert not out.y_dot[2, 0, 4:].isfinite().any()  # t - inf - xhat * (+-inf)
    hits = hits.clone()
    hits[2, 0, 4:] = True
    assert torch.equal(out.y_dot[~hits], clean.y_dot[~hits])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values_of_the_logistic_function(backend):
    """z from -200 to 200: neither overflow nor NaN, and slopes 0 and 1 at the ends."""
    device = testing.device_of(backend)
    bias = torch.tensor([-200.0, -100.0, -88.0, -87.0, -20.0, -1.0, 0.0, 1.0, 20.0, 87.0, 88.0, 100.0, 200.0])
    given = problem((1, 13, 40), 2, device=device) | {"bias": bias.to(device)}
    out, (y, y_dot, *_) = run(given, 13, backend), exact(given, 13)
    torch.testing.assert_close(out.y.cpu().double(), y, rtol=1e-5, atol=1e-34)
    torch.testing.assert_close(out.y_dot.cpu().double(), y_dot, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "tangents"),
    [((0, 4, 3), 2), ((2, 4, 0), 2), ((2, 4, 3, 0), 0), ((2, 4, 3), 0), ((2, 0, 3), 2), ((2, 4), 1), ((1, 2, 1, 1), 1)],
    ids=str,
)
def test_empty_and_tiny(backend, shape, tangents):
    given = problem(shape, tangents, residual=True, device=testing.device_of(backend))
    out = run(given, 2, backend)
    assert [tuple(a.shape) for a in out] == [shape, (tangents, *shape)] * 2
    if given["x"].numel():
        assert_near(out.y, exact(given, 2)[0], 1e-6)


def channels_last(array):
    return array.movedim(-3, -1).contiguous().movedim(-1, -3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts(backend, dtype):
    """Of any strides in, channels-last out where it was in; the CPU gives the same bits."""
    given = problem((2, 12, 5, 6), 3, dtype, True, testing.device_of(backend))
    expected = run(given, 3, backend)
    names = ("x", "x_dot", "residual", "residual_dot")
    strided = {name: torch.stack([given[name]] * 2, -1)[..., 1] for name in names}
    transposed = {name: given[name].mT.contiguous().mT for name in names}
    cut = {name: torch.cat([given[name]] * 2, -3)[..., :12, :, :] for name in names}
    last = {name: channels_last(given[name]) for name in names}
    mixed = last | {"x": given["x"], "residual_dot": given["residual_dot"]}
    crossed = {
        "x": last["x"],
        "x_dot": given["x_dot"],
        "residual": given["residual"],
        "residual_dot": last["residual_dot"],
    }
    for kind in (strided, transposed, cut, last, mixed, crossed):
        out = run(given | kind, 3, backend)
        for found, wanted, like in zip(out, expected, (kind["x"], kind["x_dot"]) * 2, strict=True):
            if backend == "cpu":
                assert torch.equal(found, wanted)
            else:
                assert_near(found, wanted.cpu().double(), 2 * EPS[dtype] + 2e-6)
            if any(kind is other for other in (last, mixed, crossed)):
                assert found.stride() == like.stride()
            else:
                assert found.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_tangents(backend):
    given = problem((2, 6, 5, 4), 1, device=testing.device_of(backend))
    one = run(given, 3, backend).y_dot
    many = run(given | {"x_dot": given["x_dot"].expand(4, -1, -1, -1, -1)}, 3, backend).y_dot
    assert torch.equal(many, one.expand_as(many))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (1, 2, 4500), (1, 2, 9000)], ids=str)
def test_bits_do_not_depend_on_what_else_is_computed(backend, dtype, shape):
    """Neither on K, nor on the other samples and groups, nor on the run."""
    given = problem(shape, 24, dtype, True, testing.device_of(backend))
    out = run(given, 2, backend)
    assert all(torch.equal(a, b) for a, b in zip(run(given, 2, backend), out, strict=True))
    dots = {name: given[name][7:8] for name in ("x_dot", "residual_dot")}
    one = run(given | dots, 2, backend)
    assert torch.equal(one.y, out.y) and torch.equal(one.y_dot[0], out.y_dot[7])
    half = shape[1] // 2
    part = {
        name: given[name][half:] if given[name].dim() == 1 else given[name].narrow(-len(shape) + 1, half, half)
        for name in given
    }
    last = run(part, 1, backend)
    assert torch.equal(last.y, out.y[:, half:]) and torch.equal(last.y_dot, out.y_dot[:, :, half:])
    sample = run({name: a if a.dim() == 1 else a.narrow(-len(shape), 0, 1) for name, a in given.items()}, 2, backend)
    assert torch.equal(sample.y_dot, out.y_dot[:, :1])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="pyattr._C is not built")
@pytest.mark.parametrize("shape", [(1, 2, 300), (3, 8, 40)], ids=str)
def test_bits_do_not_depend_on_threads(shape):
    given = problem(shape, 5)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(run(given, 2, "cpu"))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other[:2], results[0][:2], strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("positions", [4100, 4099])
def test_tangents_that_no_cache_holds_have_the_same_bits(backend, positions):
    """The CPU writes more than 32 MB past the caches, where a row's address allows it."""
    given = problem((1, 2, positions), 1, device=testing.device_of(backend))
    tangents = torch.randn(1030, 1, 2, positions, device=given["x"].device)
    y_dot = run(given | {"x_dot": tangents}, 2, backend).y_dot
    assert y_dot.nbytes > 32 << 20 and not y_dot.isnan().any()
    some = slice(3, None, 257)
    assert torch.equal(run(given | {"x_dot": tangents[some]}, 2, backend).y_dot, y_dot[some])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_rounded_as_torch_rounds(backend, dtype):
    """Every 16-bit number plus a small, a large, and no other: subnormals, ties, overflow, infinities."""
    device = testing.device_of(backend)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, -1).to(device)
    for other in (0.0, 2.0**-24, 1.0, -3.0, 30000.0):
        residual = torch.full_like(x, other)
        s = group_norm_silu_jvp(x, x[None], 1, residual=residual, residual_dot=residual[None], backend=backend)
        wanted = (x.float() + residual.float()).to(dtype)
        for found in (s.sum, s.sum_dot[0]):
            assert torch.equal(found.isnan(), wanted.isnan())
            assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


PROGRAM = """
import hashlib, sys, torch
from pyattr import backends, testing
from pyattr.ops import group_norm_silu_jvp
assert backends.extension().simd_level() == sys.argv[1]
digest = hashlib.sha256()
for dtype in testing.DTYPES:
    for shape, groups in (((1, 4, 33), 4), ((2, 6, 5, 7), 3), ((1, 2, 1500), 1)):
        generator = torch.Generator().manual_seed(1)
        x, r = (torch.randn(shape, generator=generator).mul(3).to(dtype) for _ in range(2))
        x_dot, r_dot = (torch.randn(3, *shape, generator=generator).to(dtype) for _ in range(2))
        w, b = torch.randn(2, shape[1], generator=generator) * 4
        for kind in ({}, {"residual": r, "residual_dot": r_dot}):
            for out in group_norm_silu_jvp(x, x_dot, groups, w, b, backend="cpu", **kind):
                if out is not None:
                    digest.update(out.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""
LEVELS = [] if isinstance(backends.extension(), str) else backends.extension().simd_levels()


@pytest.mark.skipif(not LEVELS, reason="pyattr._C is not built")
def test_every_simd_level_gives_the_same_bits():
    """In a process of its own, since the level is chosen once."""
    digests = {}
    for level in LEVELS:
        environment = os.environ | {"PYATTR_SIMD": level}
        command = [sys.executable, "-W", "error", "-c", PROGRAM, level]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests[level] = done.stdout
    assert len(set(digests.values())) == 1, digests
    assert len(digests[LEVELS[0]].strip()) == 2 * hashlib.sha256().digest_size


@pytest.mark.parametrize("backend", KERNELS)
@hypothesis.given(
    samples=st.integers(1, 3), groups=st.integers(1, 4), width=st.integers(1, 5), positions=st.integers(0, 70),
    tangents=st.integers(0, 4), dtype=st.sampled_from(testing.DTYPES), silu=st.booleans(), residual=st.booleans(),
    last=st.booleans(),
)  # fmt: skip
def test_any_problem(backend, samples, groups, width, positions, tangents, dtype, silu, residual, last):
    given = problem((samples, groups * width, positions), tangents, dtype, residual, testing.device_of(backend))
    if last:
        given |= {name: given[name].mT.contiguous().mT for name in given if given[name].dim() > 1}
    out = run(given, groups, backend, silu=silu, eps=0.1)
    wanted = run({name: a.double() for name, a in given.items()}, groups, "reference", silu=silu, eps=0.1)
    for found, expected in zip(out, wanted, strict=True):
        if found is not None:
            torch.testing.assert_close(found.double(), expected, rtol=2 * EPS[dtype] + 1e-6, atol=2e-5)


def test_numpy_in_numpy_out():
    given = {name: array.numpy() for name, array in problem((2, 6, 5), 2, residual=True).items()}
    out = run(given, 3, None)
    wanted = exact({name: torch.from_numpy(a) for name, a in given.items()}, 3)
    assert isinstance(out, GroupNormJvp)
    for found, expected in zip(out, wanted, strict=True):
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        assert_near(torch.from_numpy(found), expected, 2e-6)


def test_parameters_that_require_gradients_are_constants():
    given = problem((2, 6, 5), 2)
    out = run(given | {name: given[name].requires_grad_() for name in ("x", "weight", "bias")}, 3, None)
    assert not out.y.requires_grad and not out.y_dot.requires_grad
