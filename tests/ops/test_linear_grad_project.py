"""Fused projection of a linear layer's gradients: the projection of vmap(grad)'s flat gradient, in bounded memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from pyattr import ops, testing
from pyattr.backends import BackendError
from pyattr.ops import linear_grad_project
from pyattr.ops._layers import Layer

BACKENDS = testing.usable_backends("linear_grad_project")
FAST = [name for name in BACKENDS if name != "reference"]
PROJECT = {
    "rademacher": ops.rademacher_project,
    "gaussian": ops.gaussian_project,
    "sparse": ops.sparse_project,
    "multisketch": ops.multisketch_project,
}


def flat_gradient(acts, errs, bias):  # [B, T, I], [B, T, O] -> [B, P] float64, by vmap(grad)
    layer = nn.Linear(acts.shape[-1], errs.shape[-1], bias=bias).double()

    def loss(parameters, x, e):
        return (torch.func.functional_call(layer, parameters, (x,)) * e).sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
        {name: p.detach() for name, p in layer.named_parameters()}, acts.double().cpu(), errs.double().cpu()
    )
    return torch.cat([grads[name].flatten(1) for name, _ in layer.named_parameters()], 1)


def check(acts, errs, proj_dim, backend, kind, bias=True, column_offset=0, **options):
    flat = flat_gradient(acts, errs, bias)
    total = column_offset + flat.shape[1]
    out = linear_grad_project(
        acts,
        errs,
        proj_dim,
        bias=bias,
        kind=kind,
        column_offset=column_offset,
        num_columns=total,
        backend=backend,
        **options,
    )
    extra = {"num_columns": total} if kind in ("sparse", "multisketch") else {}
    expected = PROJECT[kind](flat, proj_dim, column_offset=column_offset, **extra, **options)
    assert out.shape == (len(acts), proj_dim) and out.dtype == torch.float32
    size = acts.cpu().double().norm(dim=2)[:, :, None] * errs.cpu().double().norm(dim=2)[:, :, None]
    budget = flat.abs().sum(1) + size.sum((1, 2)) * (flat.shape[1] ** 0.5)
    scale = abs(options.get("scale", 1.0)) * (4.0 if kind == "gaussian" else 1.0)
    assert ((out.cpu() - expected).abs() <= scale * 2.0**-18 * budget[:, None]).all()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """One sample, two positions: G = e1 a1^T + e2 a2^T, row by row, then the bias e1 + e2."""
    device = testing.device_of(backend)
    acts = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]], device=device)
    errs = torch.tensor([[[3.0], [10.0]]], device=device)
    out = linear_grad_project(acts, errs, 4, bias=True, seed=5, backend=backend)
    signs = ops.sign_matrix(range(4), range(3), 5)
    assert torch.equal(out[0].cpu(), 3 * signs[:, 0] + 16 * signs[:, 1] + 13 * signs[:, 2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PROJECT)
@pytest.mark.parametrize("bias", (False, True))
def test_equals_the_projection_of_the_flat_gradient(backend, kind, bias):
    device = testing.device_of(backend)
    for batch, positions, width, rows, offset in ((3, 4, 7, 5, 9), (1, 1, 1, 1, 0), (9, 2, 33, 26, 127)):
        acts, errs = (
            torch.randn(batch, positions, width, device=device),
            torch.randn(batch, positions, rows, device=device),
        )
        check(acts, errs, 24, backend, kind, bias, offset, seed=4, stream=2, scale=0.5)


@pytest.mark.parametrize("backend", FAST)
@given(
    batch=st.integers(1, 12),
    positions=st.integers(1, 40),
    width=st.integers(1, 60),
    rows=st.integers(1, 30),
    proj_dim=st.integers(3, 130),
    nonzeros=st.integers(1, 3),
    offset=st.integers(0, 2**30),
)
def test_sketches_of_any_shape(backend, batch, positions, width, rows, proj_dim, nonzeros, offset):
    device = testing.device_of(backend)
    acts, errs = torch.randn(batch, positions, width, device=device), torch.randn(batch, positions, rows, device=device)
    check(acts, errs, proj_dim, backend, "sparse", column_offset=offset, nonzeros=nonzeros, seed=1)


@pytest.mark.parametrize("backend", FAST)
def test_many_positions_rows_and_columns(backend):
    """More than a block of each: 600 positions in three blocks, 2,100 columns in three, 50 rows."""
    device = testing.device_of(backend)
    acts, errs = torch.randn(2, 600, 2100, device=device), torch.randn(2, 600, 50, device=device)
    for kind in ("sparse", "rademacher"):
        check(acts, errs, 96, backend, kind, column_offset=5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", ("sparse", "rademacher"))
def test_sixteen_bits_are_summed_in_float32(backend, dtype, kind):
    acts = torch.randn(3, 50, 20, device=testing.device_of(backend)).to(dtype)
    errs = torch.randn(3, 50, 6, device=acts.device).to(dtype)
    check(acts, errs, 40, backend, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("sparse", "rademacher"))
def test_strides_and_one_position(backend, kind):
    device = testing.device_of(backend)
    acts, errs = torch.randn(8, 9, 12, device=device)[::2, :, ::3], torch.randn(6, 9, 4, device=device).movedim(2, 0)
    errs = errs.movedim(0, 2)[:4]
    expanded = errs[:, :1].expand(4, 9, 4)
    for e in (errs, expanded):
        out = linear_grad_project(acts, e, 20, kind=kind, backend=backend)
        torch.testing.assert_close(
            out, linear_grad_project(acts.contiguous(), e.contiguous(), 20, kind=kind, backend=backend)
        )
    one = linear_grad_project(acts[:, 0], errs[:, 0], 20, kind=kind, backend=backend)
    torch.testing.assert_close(one, linear_grad_project(acts[:, :1], errs[:, :1], 20, kind=kind, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PROJECT)
def test_nothing_to_sum(backend, kind):
    device = testing.device_of(backend)
    for shape in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        acts, errs = torch.randn(shape, device=device), torch.ones(*shape[:2], 4, device=device)
        out = linear_grad_project(acts, errs, 5, kind=kind, backend=backend)
        assert out.shape == (shape[0], 5) and not out.any()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
def test_sketches_have_the_same_bits_for_any_threads_and_batch():
    acts, errs = torch.randn(19, 2000, 30), torch.randn(19, 2000, 7)
    torch.set_num_threads(1)
    options = {"kind": "sparse", "bias": True, "backend": "cpu"}
    whole = linear_grad_project(acts, errs, 64, **options)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(linear_grad_project(acts, errs, 64, **options), whole)
    for a, b in ((0, 1), (1, 10), (10, 19)):
        assert torch.equal(linear_grad_project(acts[a:b], errs[a:b], 64, **options), whole[a:b])


@pytest.mark.parametrize("backend", FAST)
def test_not_finite_values_reach_their_own_columns_and_no_other_sample(backend):
    acts, errs = torch.ones(3, 1, 4), torch.ones(3, 1, 2)
    acts[1, 0, 2] = float("nan")
    acts, errs = acts.to(testing.device_of(backend)), errs.to(testing.device_of(backend))
    out = linear_grad_project(acts, errs, 64, kind="sparse", backend=backend).cpu()
    rows, _ = ops.sketch_entries([2, 6], 64)
    assert out[1].isnan().nonzero().flatten().tolist() == sorted(set(rows.flatten().tolist()))
    assert out[[0, 2]].isfinite().all()
    assert linear_grad_project(acts, errs, 64, backend=backend)[1].isnan().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ("rademacher", "sparse"))
def test_the_gradient_is_never_whole(backend, kind, monkeypatch):
    """16 samples of 1024 x 1536 would take 100 MB; tiles take at most 32, and the sketch on the CPU forms none."""
    tiles, original = [], Layer.put
    monkeypatch.setattr(
        Layer, "put", lambda self, rows, out, add: tiles.append(out.nbytes) or original(self, rows, out, add)
    )
    acts, errs = torch.randn(16, 1, 1536), torch.randn(16, 1, 1024)
    acts, errs = acts.to(testing.device_of(backend)), errs.to(testing.device_of(backend))
    linear_grad_project(acts, errs, 16, kind=kind, backend=backend)
    if kind == "sparse" and backend == "cpu":
        assert tiles == []
    else:
        assert max(tiles) <= 32 << 20 and sum(tiles) == 4 * 16 * 1536 * 1024


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("sparse", "rademacher"))
def test_tensors_that_are_not_what_their_memory_says(backend, kind):
    """Negated, or zero, in name only."""
    device = testing.device_of(backend)
    errs, negated = (
        torch.randn(3, 4, device=device),
        torch.randn(3, 5, dtype=torch.complex64, device=device).conj().imag,
    )
    assert negated.is_neg()
    out = linear_grad_project(negated, errs, 8, kind=kind, backend=backend)
    assert torch.equal(out, linear_grad_project(negated.clone().resolve_neg(), errs, 8, kind=kind, backend=backend))
    zero = torch._efficientzerotensor((3, 5), device=device)
    assert not linear_grad_project(zero, errs, 8, kind=kind, backend=backend).any()


def test_derivatives_are_refused_instead_of_lost():
    message = "linear_grad_project: acts must be a plain tensor: the op has no derivatives and no vmap"
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda x: linear_grad_project(x, x, 4, kind="sparse"))(torch.randn(2, 3, 4))
    with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
        linear_grad_project(forward_ad.make_dual(torch.randn(3, 4), torch.randn(3, 4)), torch.randn(3, 4), 4)


@pytest.mark.parametrize("kind", ("sparse", "multisketch"))
def test_more_rows_than_are_gathered_at_a_time(kind):
    """4,100 rows in three ranges, with so many positions that the tile holds a range whole."""
    acts, errs = torch.randn(1, 300, 5), torch.randn(1, 300, 4100)
    check(acts, errs, 64, None, kind, column_offset=3)


def test_numpy_in_numpy_out_and_float64_on_the_reference():
    acts, errs = np.random.randn(3, 4).astype(np.float32), np.random.randn(3, 2).astype(np.float32)
    out = linear_grad_project(acts, errs, 5)
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, linear_grad_project(torch.from_numpy(acts), torch.from_numpy(errs), 5).numpy())
    wide = linear_grad_project(acts.astype(np.float64), errs.astype(np.float64), 5)
    assert wide.dtype == np.float64
    with pytest.raises(BackendError, match=r"acts is torch\.float64, this backend takes float16, bfloat16 and float32"):
        linear_grad_project(torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), 3, backend="cpu")


ERRORS = (
    ({"acts": torch.zeros(3)}, ValueError, "acts must have shape [B, I] or [B, T, I], got [3]"),
    ({"errs": torch.zeros(2, 3, 4)}, ValueError, "errs must have as many dimensions as acts, 2, got 3"),
    ({"errs": torch.zeros(3, 4)}, ValueError, "errs must have the samples and positions of acts, [2], got [3]"),
    ({"errs": torch.zeros(2, 4).half()}, ValueError, "errs must have the dtype of acts, torch.float32, got torch.float16"),
    ({"errs": np.zeros((2, 4), np.float32)}, TypeError, "errs must be of the library of acts, torch, got numpy"),
    ({"acts": torch.zeros(2, 3).long()}, TypeError, "acts must be float16, bfloat16, float32 or float64, got torch.int64"),
    (
        {"acts": torch.zeros(2, 3).requires_grad_()},
        ValueError,
        "acts must not require a gradient, which would be lost: detach it",
    ),
    ({"kind": "dense"}, ValueError, "kind must be one of rademacher, gaussian, sparse, multisketch, got 'dense'"),
    ({"bias": 1}, TypeError, "bias must be a bool, got int"),
    ({"proj_dim": 0}, ValueError, "proj_dim must lie in [1, 4294967296], got 0"),
    ({"nonzeros": 2}, ValueError, "nonzeros must be 1 for kind 'rademacher', got 2"),
    ({"nonzeros": 9, "kind": "sparse"}, ValueError, "nonzeros must lie in [1, 8], got 9"),
    (
        {"column_offset": 5, "kind": "sparse"},
        ValueError,
        "num_columns must be given with column_offset, got None",
    ),
    (
        {"column_offset": 5, "num_columns": 16},
        ValueError,
        "num_columns must be at least column_offset + P = 17, got 16",
    ),
    ({"seed": -1}, ValueError, "seed must lie in [0, 4294967295], got -1"),
    ({"scale": "x"}, TypeError, "scale must be a real number, got str"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message):
    arguments = {"acts": torch.zeros(2, 3), "errs": torch.zeros(2, 4), "proj_dim": 6} | change
    with pytest.raises(error) as caught:
        linear_grad_project(**arguments)
    assert str(caught.value) == f"linear_grad_project: {message}"
