"""attention_jvp: a case worked by hand, torch.func.jvp of plain attention in float64, masks, and the properties it promises."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_arrays import make
from hypothesis import given
from hypothesis import strategies as st

from pyattr import backends, testing
from pyattr.ops import attention_jvp

BACKENDS = testing.usable_backends("attention_jvp")
FAST = [name for name in BACKENDS if name != "reference"]
CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
INF = float("inf")


def tolerance(dtype, backend):
    """Of a norm error: half a unit in the last place where y is rounded to 16 bits, the sums' own error in float32."""
    three_of_tf32 = {"triton": 1e-5}  # instead of float32 products
    wide = {torch.float32: three_of_tf32.get(backend, 2e-6), torch.float64: 1e-13}
    return (wide | {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8})[dtype]


def plain(query, key, value, mask=None, causal=False, scale=None):
    """Attention in torch's operators; no row may be forbidden altogether."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -INF)
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def on_cpu(options):
    return {name: o.cpu() if isinstance(o, torch.Tensor) else o for name, o in options.items()}


def by_torch(arrays, **options):
    """y and y_dot in float64 by torch.func.jvp, one tangent at a time."""
    arrays = [a.double().cpu() for a in arrays]
    options = on_cpu(options)
    primals, tangents = arrays[:3], zip(*arrays[3:], strict=True)

    def function(*inputs):
        return plain(*inputs, **options)

    return function(*primals), torch.stack([torch.func.jvp(function, tuple(primals), dots)[1] for dots in tangents])


def error(found, exact):
    """The larger norm error of y and y_dot."""
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(found, exact, strict=True)]
    return max(((a - b).norm() / b.norm().clamp_min(1e-300)).item() if b.numel() else 0.0 for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Scores 0 and ln 3, so P = (1/4, 3/4); S_dot = (0, 1): its mean is 3/4, P_dot = (-3/16, 3/16)."""
    device = testing.device_of(backend)
    query = torch.tensor([[[[1.0, 0.0]]]], device=device)
    key = torch.tensor([[[[0.0, 2.0], [math.log(3.0), 5.0]]]], device=device)
    value = torch.tensor([[[[4.0, 1.0], [8.0, 1.0]]]], device=device)
    key_dot = torch.tensor([[[[[0.0, 7.0], [1.0, 9.0]]]]], device=device)
    found = attention_jvp(query, key, value, None, key_dot, None, scale=1.0, backend=backend)
    torch.testing.assert_close(found.y.cpu(), torch.tensor([[[[7.0, 1.0]]]]))
    torch.testing.assert_close(found.y_dot.cpu(), torch.tensor([[[[[0.75, 0.0]]]]]))
    query_dot = torch.tensor([[[[[0.0, 1.0]]]]], device=device)  # S_dot = (2, 5): P_dot = (-9/16, 9/16)
    value_dot = torch.tensor([[[[[1.0, 0.0], [0.0, 2.0]]]]], device=device)
    found = attention_jvp(query, key, value, query_dot, None, value_dot, scale=1.0, backend=backend)
    torch.testing.assert_close(found.y_dot.cpu(), torch.tensor([[[[[2.25 + 0.25, 1.5]]]]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 256, 256, 64, 64, 3), (2, 3, 17, 77, 40, 24, 2), (1, 1, 257, 65, 130, 300, 1)]
)
def test_against_torch(backend, dtype, shape):
    arrays = make(*shape, dtype=dtype, device=testing.device_of(backend))
    found = attention_jvp(*arrays, backend=backend)
    assert found.y.dtype == found.y_dot.dtype == dtype
    assert error(found, by_torch(arrays)) <= tolerance(dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "bool [L, S]", "added", "added [B, 1, 1, S]"])
def test_masks_against_torch(backend, kind, causal):
    device = testing.device_of(backend)
    arrays = make(2, 3, 9, 37, 8, 5, 2, device=device)
    mask = None
    if kind.startswith("bool"):
        mask = torch.rand((9, 37) if "[" in kind else (2, 3, 9, 37), device=device) > 0.4
        mask[..., 0] = True
    if kind.startswith("added"):
        mask = 3 * torch.randn((2, 1, 1, 37) if "[" in kind else (9, 37), device=device)
        mask[..., 5::3] = -INF
    found = attention_jvp(*arrays, mask=mask, causal=causal, scale=0.7, backend=backend)
    assert error(found, by_torch(arrays, mask=mask, causal=causal, scale=0.7)) <= tolerance(torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_y_is_what_torchs_attention_gives(backend, shape):
    device = testing.device_of(backend)
    arrays = make(2, 2, *shape, 8, 8, 1, device=device)
    mask = torch.rand(shape, device=device) > 0.5
    mask[1] = False  # a query that may attend to nothing
    for options in ({"attn_mask": mask}, {"is_causal": True}, {"scale": -0.3}):
        mine = {"attn_mask": "mask", "is_causal": "causal", "scale": "scale"}
        found = attention_jvp(*arrays, backend=backend, **{mine[name]: o for name, o in options.items()})
        expected = F.scaled_dot_product_attention(*(a.cpu() for a in arrays[:3]), **on_cpu(options))
        torch.testing.assert_close(found.y.cpu(), expected)


@pytest.mark.parametrize("backend", FAST)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    width=st.integers(1, 40),
    value_width=st.integers(1, 70),
    tangents=st.integers(1, 3),
    given_tangents=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    views=st.booleans(),
    causal=st.booleans(),
)
def test_any_shape_against_the_reference(
    backend, batch, heads, queries, keys, width, value_width, tangents, given_tangents, views, causal
):
    sizes = (batch, heads, queries, keys, width, value_width, tangents)
    arrays = make(*sizes, device=testing.device_of(backend), views=views)
    arrays[3:] = [a if there else None for a, there in zip(arrays[3:], given_tangents, strict=True)]
    found = attention_jvp(*arrays, causal=causal, backend=backend)
    exact = attention_jvp(*(None if a is None else a.double() for a in arrays), causal=causal, backend="reference")
    assert (found.y - exact.y).abs().max() <= 1e-5
    assert (found.y_dot - exact.y_dot).abs().max() <= 1e-5 * max(exact.y_dot.abs().max(), 5.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_in_the_tangents_and_none_is_zero(backend):
    *primals, query_dot, key_dot, value_dot = make(1, 2, 12, 20, 6, 10, 3, device=testing.device_of(backend))
    whole = attention_jvp(*primals, query_dot, key_dot, value_dot, backend=backend)
    parts = [
        attention_jvp(*primals, *dots, backend=backend)
        for dots in ((query_dot, None, None), (None, key_dot, None), (None, None, value_dot))
    ]
    assert all(torch.equal(part.y, whole.y) for part in parts)
    torch.testing.assert_close(sum(part.y_dot for part in parts), whole.y_dot, rtol=0, atol=1e-5)
    scaled = attention_jvp(*primals, -2 * query_dot, -2 * key_dot, -2 * value_dot, backend=backend)
    assert torch.equal(scaled.y_dot, -2 * whole.y_dot)  # by a power of two, exactly
    zeros = torch.zeros_like(key_dot)
    written = attention_jvp(*primals, query_dot, zeros, value_dot, backend=backend)
    left_out = attention_jvp(*primals, query_dot, None, value_dot, backend=backend)
    assert torch.equal(written.y_dot, left_out.y_dot)
    nothing = attention_jvp(*primals, torch.zeros_like(query_dot), zeros, 0 * value_dot, backend=backend)
    assert torch.equal(nothing.y_dot, torch.zeros_like(whole.y_dot))


@pytest.mark.parametrize("backend", BACKENDS)
def test_central_differences(backend):
    """Half the difference along a small step, in float64."""
    device = testing.device_of(backend)
    primals, dots = (lambda a: (a[:3], a[3:]))(make(1, 2, 6, 9, 4, 5, 1, device=device))
    found = attention_jvp(*primals, *dots, backend=backend)
    step = 1e-6
    ahead, behind = (
        plain(*(p.double() + sign * step * d[0].double() for p, d in zip(primals, dots, strict=True)))
        for sign in (1, -1)
    )
    torch.testing.assert_close(found.y_dot[0].double(), (ahead - behind) / (2 * step), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_adjoint_of_reverse_mode(backend):
    primals, dots = (lambda a: (a[:3], a[3:]))(make(2, 2, 7, 11, 6, 4, 1, device=testing.device_of(backend)))
    y_bar = torch.randn(2, 2, 7, 4).to(primals[0])
    leaves = [p.double().requires_grad_() for p in primals]
    bars = torch.autograd.grad(plain(*leaves), leaves, y_bar.double())
    expected = sum((bar * dot[0]).sum() for bar, dot in zip(bars, dots, strict=True))
    found = (attention_jvp(*primals, *dots, backend=backend).y_dot[0] * y_bar).sum()
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_a_tangents_bits_depend_on_nothing_else(backend):
    arrays = make(2, 3, 40, 50, 20, 30, 24, device=testing.device_of(backend))
    mask = torch.rand(40, 50, device=arrays[0].device) > 0.3
    whole = attention_jvp(*arrays, mask=mask, backend=backend)
    for k in (0, 7, 23):
        alone = attention_jvp(*arrays[:3], *(a[k : k + 1] for a in arrays[3:]), mask=mask, backend=backend)
        assert torch.equal(alone.y, whole.y) and torch.equal(alone.y_dot[0], whole.y_dot[k])
    one_head = attention_jvp(*(a[..., 1:, 2:, :, :] for a in arrays), mask=mask, backend=backend)
    assert torch.equal(one_head.y, whole.y[1:, 2:]) and torch.equal(one_head.y_dot, whole.y_dot[:, 1:, 2:])
    again = attention_jvp(*arrays, mask=mask, backend=backend)
    assert torch.equal(again.y, whole.y) and torch.equal(again.y_dot, whole.y_dot)


@pytest.mark.parametrize("backend", FAST)
def test_strides_change_no_bit(backend):
    views = make(2, 3, 11, 19, 8, 6, 2, device=testing.device_of(backend), views=True)
    mask = torch.randn(19, 11, device=views[0].device).T  # [L, S]
    expected = attention_jvp(*(a.contiguous() for a in views), mask=mask.contiguous(), backend=backend)
    spread = [torch.stack([a, a + 1], -1)[..., 0] for a in views]
    columns_first = [a.mT.contiguous().mT for a in views]
    flipped = [a.flip(0).contiguous().flip(0) for a in views]
    for inputs in (views, spread, columns_first, flipped):
        found = attention_jvp(*inputs, mask=mask, backend=backend)
        assert torch.equal(found.y, expected.y) and torch.equal(found.y_dot, expected.y_dot)
    one_tangent_for_all = [a[:1].expand(4, *a.shape[1:]) for a in views[3:]]  # stride 0
    found = attention_jvp(*views[:3], *one_tangent_for_all, mask=mask, backend=backend)
    assert all(torch.equal(found.y_dot[k], expected.y_dot[0]) for k in range(4))


@CPU
def test_bits_do_not_depend_on_threads():
    arrays = make(1, 2, 100, 90, 40, 50, 3)
    torch.set_num_threads(1)
    one = attention_jvp(*arrays, backend="cpu")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        again = attention_jvp(*arrays, backend="cpu")
        assert torch.equal(again.y, one.y) and torch.equal(again.y_dot, one.y_dot)


LEVELS = [] if isinstance(backends.extension(), str) else backends.extension().simd_levels()
PROGRAM = """
import hashlib, sys, torch
from pyattr import backends
from pyattr.ops import attention_jvp
assert backends.extension().simd_level() == sys.argv[1]
digest = hashlib.sha256()
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for batch, heads, queries, keys, width, values in ((1, 2, 19, 45, 300, 33), (2, 1, 7, 270, 5, 70)):
        sizes = ((queries, width), (keys, width), (keys, values))
        arrays = [torch.randn(*lead, batch, heads, *size).to(dtype) for lead in ((), (2,)) for size in sizes]
        mask = torch.randn(queries, keys)
        mask[mask > 1] = -torch.inf
        for part in attention_jvp(*arrays, mask=mask, backend="cpu"):
            digest.update(part.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@CPU
def test_every_simd_level_gives_the_same_bits():
    digests = {}
    for level in LEVELS:
        environment = os.environ | {"PYATTR_SIMD": level}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM, level], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        digests[level] = done.stdout
    assert len(set(digests.values())) == 1, digests


@CPU
def test_more_than_a_wave():
    """Heads and rows whose probabilities exceed 8 MB, tangents whose packed copies exceed 4 MB."""
    for shape in ((1, 5, 700, 900, 4, 3, 2), (1, 1, 1500, 1800, 3, 2, 2), (1, 1, 20, 1200, 500, 500, 3)):
        arrays = make(*shape)
        exact = attention_jvp(*(a.double() for a in arrays), backend="reference")
        assert error(attention_jvp(*arrays, backend="cpu"), exact) <= tolerance(torch.float32, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_may_attend_to_nothing(backend):
    arrays = make(1, 2, 5, 6, 4, 3, 2, device=testing.device_of(backend))
    mask = torch.ones(5, 6, dtype=torch.bool, device=arrays[0].device)
    mask[2] = False
    added = torch.zeros(5, 6, device=arrays[0].device).masked_fill(~mask, -INF)
    found = [attention_jvp(*arrays, mask=m, backend=backend) for m in (mask, added)]
    for part in found:
        assert torch.equal(part.y[:, :, 2], torch.zeros_like(part.y[:, :, 2]))
        assert torch.equal(part.y_dot[:, :, :, 2], torch.zeros_like(part.y_dot[:, :, :, 2]))
    assert torch.equal(found[0].y, found[1].y) and torch.equal(found[0].y_dot, found[1].y_dot)
    everything = attention_jvp(*arrays, backend=backend)
    rows = [0, 1, 3, 4]
    assert torch.equal(found[0].y_dot[..., rows, :], everything.y_dot[..., rows, :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend):
    """Scores of hundreds: one key takes all, and nothing overflows; offsets common to a row change nothing."""
    device = testing.device_of(backend)
    *primals, query_dot, key_dot, value_dot = make(1, 1, 6, 9, 4, 3, 1, device=device)
    arrays = (300 * primals[0], *primals[1:], query_dot, None, value_dot)
    found = attention_jvp(*arrays, backend=backend)
    exact = attention_jvp(*(None if a is None else a.double() for a in arrays), backend="reference")
    assert error(found, exact) <= (1e-3 if backend == "triton" else 2e-5)
    shifted = attention_jvp(
        *primals, query_dot, key_dot, value_dot, mask=torch.full((6, 1), 64.0, device=device), backend=backend
    )
    expected = attention_jvp(*primals, query_dot, key_dot, value_dot, backend=backend)
    torch.testing.assert_close(shifted.y_dot, expected.y_dot, rtol=0, atol=1e-4)  # scores near 64: units of 2^-18


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite(backend):
    arrays = make(1, 2, 5, 7, 4, 3, 2, device=testing.device_of(backend))
    clean = attention_jvp(*arrays, backend=backend)

    def changed(which, index, value, **options):
        copies = [a.clone() for a in arrays]
        copies[which][index] = value
        return attention_jvp(*copies, backend=backend, **options)

    for bad in (math.nan, INF):
        found = changed(0, (0, 1, 3, 2), bad)  # a query: its row
        assert found.y[0, 1, 3].isnan().all() and found.y_dot[:, 0, 1, 3].isnan().all()
        assert torch.equal(found.y[0, 0], clean.y[0, 0]) and torch.equal(found.y_dot[:, 0, 0], clean.y_dot[:, 0, 0])
        assert torch.equal(found.y[0, 1, :3], clean.y[0, 1, :3])
        found = changed(3, (1, 0, 1, 3, 2), bad)  # a query's tangent: its row of that tangent
        assert torch.equal(found.y, clean.y) and torch.equal(found.y_dot[0], clean.y_dot[0])
        assert found.y_dot[1, 0, 1, 3].isnan().all() and not found.y_dot[1, 0, 1, :3].isnan().any()
        found = changed(4, (0, 0, 0, 2, 1), bad)  # a key's tangent: every row
        assert found.y_dot[0, 0, 0].isnan().all() and torch.equal(found.y_dot[1], clean.y_dot[1])
    found = changed(2, (0, 0, 4, 1), math.nan)  # a value: its column
    assert found.y[0, 0, :, 1].isnan().all() and not found.y[0, 0, :, 0].isnan().any()
    assert found.y_dot[:, 0, 0, :, 1].isnan().all() and not found.y_dot[:, 0, 0, :, 0].isnan().any()
    found = changed(5, (1, 0, 0, 4, 1), INF)
    column = found.y_dot[1, 0, 0, :, 1]
    assert not column.isfinite().any() and torch.equal(found.y_dot[0], clean.y_dot[0])
    assert backend == "triton" or column.isinf().all()  # in three parts, infinity less infinity


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("added", [False, True])
def test_a_forbidden_key_counts_for_nothing_whatever_it_holds(backend, added):
    arrays = make(1, 1, 5, 7, 4, 3, 2, device=testing.device_of(backend))
    mask = torch.tensor([True, True, False, True, True, False, True], device=arrays[0].device)
    expected = attention_jvp(*arrays, mask=mask, backend=backend)
    for index, bad in ((1, math.nan), (1, INF), (4, math.nan), (4, -INF)):
        copies = [a.clone() for a in arrays]
        copies[index][..., 2, :] = bad
        option = torch.zeros(7, device=mask.device).masked_fill(~mask, -INF) if added else mask
        found = attention_jvp(*copies, mask=option, backend=backend)
        assert torch.equal(found.y, expected.y) and torch.equal(found.y_dot, expected.y_dot)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5, 6, 2), (1, 0, 3, 4, 5, 6, 2), (1, 2, 0, 4, 5, 6, 2), (1, 2, 3, 4, 5, 0, 2), (1, 2, 3, 4, 5, 6, 0)]
)  # fmt: skip
def test_empty(backend, shape):
    batch, heads, queries, _, _, value_width, tangents = shape
    found = attention_jvp(*make(*shape, device=testing.device_of(backend)), backend=backend)
    assert found.y.shape == (batch, heads, queries, value_width)
    assert found.y_dot.shape == (tangents, batch, heads, queries, value_width)
    if found.y.numel():  # no tangents, but the attention itself
        assert found.y.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_and_no_width(backend):
    device = testing.device_of(backend)
    found = attention_jvp(*make(1, 2, 3, 0, 4, 5, 2, device=device), backend=backend)
    assert torch.equal(found.y, torch.zeros(1, 2, 3, 5, device=device))
    assert torch.equal(found.y_dot, torch.zeros(2, 1, 2, 3, 5, device=device))
    arrays = make(1, 2, 3, 4, 0, 5, 2, device=device)  # all scores are 0: means
    found = attention_jvp(*arrays, backend=backend)
    torch.testing.assert_close(found.y, arrays[2].mean(2, keepdim=True).expand_as(found.y))
    torch.testing.assert_close(found.y_dot, arrays[5].mean(3, keepdim=True).expand_as(found.y_dot))


def test_numpy_and_float64():
    arrays = make(1, 2, 3, 4, 5, 6, 2, dtype=torch.float64)
    found = attention_jvp(*arrays)
    assert found.y.dtype == torch.float64 and error(found, by_torch(arrays)) <= tolerance(torch.float64, "reference")
    mask = np.zeros((3, 4), np.float64)
    again = attention_jvp(*(a.numpy() for a in arrays), mask=mask)
    assert isinstance(again.y, np.ndarray) and np.array_equal(again.y_dot, found.y_dot.numpy())
    half = attention_jvp(*(a.numpy().astype(np.float16) for a in arrays))
    assert half.y_dot.dtype == np.float16
    if "cpu" in BACKENDS:
        with pytest.raises(
            backends.BackendError, match=r"query is torch\.float64, this backend takes float16, bfloat16 and float32"
        ):
            attention_jvp(*arrays, backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_torch_sees_it(backend):
    arrays = make(1, 2, 6, 7, 4, 5, 2, device=testing.device_of(backend))
    expected = attention_jvp(*arrays, backend=backend)
    negated = [torch.complex(0 * a, -a).conj().imag for a in arrays]
    zero = torch._efficientzerotensor(arrays[4].shape, device=arrays[4].device)
    assert all(a.is_neg() for a in negated)
    assert torch.equal(attention_jvp(*negated, backend=backend).y_dot, expected.y_dot)
    found = attention_jvp(*arrays[:4], zero, arrays[5], backend=backend)
    assert torch.equal(found.y_dot, attention_jvp(*arrays[:4], None, arrays[5], backend=backend).y_dot)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: attention_jvp(*a, causal=True, backend=backend).y_dot * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*arrays), 2 * attention_jvp(*arrays, causal=True, backend=backend).y_dot)
    learned = [a.clone().requires_grad_() for a in arrays[:3]]
    assert not attention_jvp(*learned, *arrays[3:], backend=backend).y_dot.requires_grad
    checks = ("test_schema", "test_faketensor")
    arguments = (*arrays, None, False, 0.5, backend)
    torch.library.opcheck(torch.ops.pyattr.attention_jvp.default, arguments, test_utils=checks)


SHAPES = {"query": (2, 3, 4, 5), "key": (2, 3, 6, 5), "value": (2, 3, 6, 7)}
ERRORS = [
    ({"query": [1.0]}, TypeError, "query must be a torch tensor, NumPy array or CuPy array, got list"),
    ({"query": torch.zeros(2, 3, 4)}, ValueError, "query must have shape [B, H, L, E], got [2, 3, 4]"),
    ({"query": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError,
     "query must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"query": torch.zeros(2, 3, 4, 5).to_sparse()}, TypeError, "query must be a dense (strided) tensor"),
    ({"key": torch.zeros(2, 3, 6, 5, dtype=torch.float16)}, TypeError,
     "key must be torch.float32 like query, got torch.float16"),
    ({"key": torch.zeros(2, 1, 6, 5)}, ValueError, "key must have shape [2, 3, S, 5], got [2, 1, 6, 5]"),
    ({"key": torch.zeros(2, 3, 6, 4)}, ValueError, "key must have shape [2, 3, S, 5], got [2, 3, 6, 4]"),
    ({"key": torch.zeros(2, 3, 6, 5, device="meta")}, ValueError, "key must be on cpu like query, got meta"),
    ({"value": torch.zeros(2, 3, 5, 7)}, ValueError, "value must have shape [2, 3, 6, V], got [2, 3, 5, 7]"),
    ({"query_dot": torch.zeros(2, 3, 4, 5)}, ValueError, "query_dot must have shape [K, 2, 3, 4, 5], got [2, 3, 4, 5]"),
    ({"key_dot": torch.zeros(8, 2, 3, 6, 4)}, ValueError, "key_dot must have shape [K, 2, 3, 6, 5], got [8, 2, 3, 6, 4]"),
    ({"key_dot": torch.zeros(8, 2, 3, 6, 5), "value_dot": torch.zeros(9, 2, 3, 6, 7)}, ValueError,
     "value_dot must have shape [8, 2, 3, 6, 7], got [9, 2, 3, 6, 7]"),
    ({"query_dot": None}, ValueError, "query_dot, key_dot or value_dot must be given, got None for all three"),
    ({"mask": torch.zeros(4, 6, dtype=torch.int64)}, TypeError,
     "mask must be bool, float16, bfloat16 or float32, or float64 with float64 queries, got torch.int64"),
    ({"mask": torch.zeros(4, 6, dtype=torch.float64)}, TypeError,
     "mask must be bool, float16, bfloat16 or float32, or float64 with float64 queries, got torch.float64"),
    ({"mask": torch.zeros(4, 5)}, ValueError, "mask must broadcast to [2, 3, 4, 6], got [4, 5]"),
    ({"mask": torch.zeros(1, 2, 3, 4, 6)}, ValueError, "mask must broadcast to [2, 3, 4, 6], got [1, 2, 3, 4, 6]"),
    ({"causal": 1}, TypeError, "causal must be a bool, got int"),
    ({"scale": "1"}, TypeError, "scale must be a real number, got str"),
    ({"scale": math.inf}, ValueError, "scale must be 0 or of magnitude 2^-126 to 2^128 (float32), got inf"),
    ({"backend": "mps"}, ValueError, "backend must be one of cuda, triton, cpu, reference, got 'mps'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors_name_the_argument(change, kind, message):
    arguments = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    arguments |= {"query_dot": torch.zeros(8, 2, 3, 4, 5), "key_dot": None, "value_dot": None}
    if {"key_dot", "value_dot"} & change.keys():
        arguments["query_dot"] = None
    with pytest.raises(kind) as caught:
        attention_jvp(**(arguments | change))
    assert str(caught.value) == f"attention_jvp: {message}"
