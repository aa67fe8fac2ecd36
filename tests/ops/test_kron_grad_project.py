"""The two-sided projection: the Kronecker product applied to the gradients that torch.func forms, and its moments."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kron_layers import close, images_and_errors, layer_gradients, matrices
from torch import nn

from pyattr import testing
from pyattr.ops import _two_sided, kron_grad_project, sparse_project
from pyattr.reference.mask_project import mask_indices

BACKENDS = testing.usable_backends("kron_grad_project")
SKETCHING = [name for name in BACKENDS if name in testing.usable_backends("sparse_project")]
FAST = [name for name in BACKENDS if name != "reference"]

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 2, "stride": 3, "dilation": 2},
    {"kernel_size": 3, "padding": 4, "dilation": (1, 2)},  # rows of the output that see nothing but padding
    {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": (2, 1), "groups": 4},
    {"kernel_size": 1},
]


# Against the Kronecker product of explicit matrices and the gradients of torch.func


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("rademacher", "gaussian", "mask"))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("positions", ((), (5,), (2, 3)))
def test_linear_is_the_kronecker_product_times_the_flat_gradient(backend, kind, bias, positions):
    device = testing.device_of(backend)
    acts, errs = torch.randn(3, *positions, 11), torch.randn(3, *positions, 6)
    flat = layer_gradients(nn.Linear(11, 6), acts, errs, bias).flatten(1)
    p_out, p_in = matrices(kind, (4, 7), 6, 11 + bias, seed=3, stream=5)
    expected = -0.5 * flat @ torch.kron(p_out, p_in).T
    options = {"bias": bias, "kind": kind, "seed": 3, "stream": 5, "scale": -0.5, "backend": backend}
    out = kron_grad_project(acts.to(device), errs.to(device), (4, 7), **options)
    assert out.shape == (3, 28) and out.dtype == torch.float32 and out.device.type == device
    close(out.cpu(), expected, acts, errs, None, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("rademacher", "gaussian", "mask"))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("leading", ((2,), (2, 3)))
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_convolution_is_the_kronecker_product_times_the_flat_gradient(backend, kind, bias, leading, convolution):
    device = testing.device_of(backend)
    layer, acts, errs = images_and_errors(convolution, leading)
    flat = layer_gradients(layer, acts, errs, bias)
    factor_dims = 5, min(4, flat.shape[2])
    p_out, p_in = matrices(kind, factor_dims, 8, flat.shape[2], seed=7, stream=2)
    expected = flat.flatten(1) @ torch.kron(p_out, p_in).T
    options = {**convolution, "bias": bias, "kind": kind, "seed": 7, "stream": 2, "backend": backend}
    out = kron_grad_project(acts.to(device), errs.to(device), factor_dims, **options)
    close(out.cpu(), expected, acts, errs, convolution, kind)


@pytest.mark.parametrize("backend", FAST)
@given(data=st.data())
def test_any_convolution_against_the_reference_in_pieces_of_any_size(backend, data):
    device, draw = testing.device_of(backend), data.draw
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    convolution = {
        "kernel_size": draw(pair(1, 3), "kernel_size"),
        "stride": draw(pair(1, 3), "stride"),
        "padding": draw(pair(0, 4), "padding"),
        "dilation": draw(pair(1, 2), "dilation"),
        "groups": draw(st.sampled_from((1, 3)), "groups"),
    }
    size, leading = draw(pair(5, 9), "size"), (draw(st.integers(0, 3), "B"), draw(st.integers(0, 3), "K"))
    channels, out_channels = (convolution["groups"] * draw(st.integers(1, 3), name) for name in ("C", "O"))
    kind, bias = draw(st.sampled_from(("rademacher", "mask")), "kind"), draw(st.booleans(), "bias")
    acts = torch.randn(*leading, channels, *size)
    layer = nn.Conv2d(channels, out_channels, **convolution)
    errs = torch.randn(*leading, *layer(torch.zeros(1, channels, *size)).shape[1:])
    width = layer.weight[0].numel() + bias
    factor_dims = draw(st.integers(1, out_channels), "k_out"), draw(st.integers(1, width), "k_in")
    options = {**convolution, "bias": bias, "kind": kind, "stream": 9}
    expected = kron_grad_project(acts.double(), errs.double(), factor_dims, **options, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_two_sided, "WORKSPACE_BYTES", draw(st.sampled_from((1, 3000, 20_000, 1 << 24)), "workspace"))
        out = kron_grad_project(acts.to(device), errs.to(device), factor_dims, **options, backend=backend)
    assert out.shape == (leading[0], factor_dims[0] * factor_dims[1])
    close(out.cpu(), expected, acts, errs, convolution)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ("rademacher", "mask"))
@pytest.mark.parametrize("shape", ((0, 4), (4, 0), (1, 1), (5, 33)))
def test_any_number_of_samples_and_tokens_in_pieces_of_any_size(backend, kind, shape, monkeypatch):
    device = testing.device_of(backend)
    acts, errs = torch.randn(*shape, 9), torch.randn(*shape, 3)
    expected = kron_grad_project(acts.double(), errs.double(), (2, 5), bias=True, kind=kind, backend="reference")
    for workspace in (1, 500, 1 << 24):
        monkeypatch.setattr(_two_sided, "WORKSPACE_BYTES", workspace)
        out = kron_grad_project(acts.to(device), errs.to(device), (2, 5), bias=True, kind=kind, backend=backend)
        assert out.shape == (shape[0], 10)
        close(out.cpu(), expected, acts, errs)


@given(
    batch=st.integers(0, 9), views=st.integers(0, 5), rows=st.integers(0, 9), row_bytes=st.integers(1, 2**40),
    workspace=st.integers(1, 2**12),
)  # fmt: skip
def test_pieces_cover_everything_once_and_fit(batch, views, rows, row_bytes, workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_two_sided, "WORKSPACE_BYTES", workspace)
        found = list(_two_sided.pieces(batch, views, rows, row_bytes))
    seen = [
        (b, v, r)
        for samples, parts in found
        for view_part, row_part in parts
        for b in range(samples.start, samples.stop)
        for v in range(view_part.start, view_part.stop)
        for r in range(row_part.start, row_part.stop)
    ]
    assert sorted(seen) == list(itertools.product(range(batch), range(views), range(rows)))
    for samples, parts in found:
        for part in parts:
            count = (samples.stop - samples.start) * np.prod([p.stop - p.start for p in part], dtype=object)
            assert count <= 1 or count * row_bytes <= workspace


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_worked_case(backend):
    """Two tokens; the signs of P_out and P_in are read off and everything is exact."""
    device = testing.device_of(backend)
    p_out, p_in = matrices("rademacher", (1, 2), 2, 2)
    acts = torch.tensor([[[1.0, 2.0], [4.0, 8.0]]], device=device)
    errs = torch.tensor([[[1.0, 0.0], [0.0, 16.0]]], device=device)
    out = kron_grad_project(acts, errs, (1, 2), backend=backend).cpu()
    # G = [[1, 2], [64, 128]]
    expected = [
        p_out[0, 0] * (p_in[j, 0] * 1 + p_in[j, 1] * 2) + p_out[0, 1] * (p_in[j, 0] * 64 + p_in[j, 1] * 128)
        for j in range(2)
    ]
    assert p_out.tolist() == [[1, -1]]
    assert out.tolist() == [[float(value) for value in expected]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_keeps_entries_of_the_gradient(backend):
    """Gradient e a^T of integers: every output is one of its entries, exactly, those of the bias among them."""
    device = testing.device_of(backend)
    acts, errs = torch.arange(2, 12.0)[None], torch.tensor([[1.0, 100.0, 10_000.0]])
    out = kron_grad_project(
        acts.to(device), errs.to(device), (2, 11), bias=True, kind="mask", backend=backend, stream=4
    )
    rows, columns = mask_indices(3, 2, 0, 8), mask_indices(11, 11, 0, 9)
    whole = torch.outer(errs[0], torch.cat([acts[0], torch.ones(1)]))
    assert sorted(columns.tolist()) == list(range(11)) and len(set(rows.tolist())) == 2
    assert torch.equal(out.cpu().view(2, 11), whole[rows][:, columns])


@pytest.mark.parametrize("backend", SKETCHING)
@pytest.mark.parametrize("kind", ("rademacher", "gaussian", "mask"))
def test_sketch_is_the_sparse_projection_of_the_flattened_product(backend, kind):
    device = testing.device_of(backend)
    _, acts, errs = images_and_errors({"kernel_size": 3}, (3,))
    options = {"kernel_size": 3, "kind": kind, "seed": 1, "stream": 6}
    flat = kron_grad_project(acts.double(), errs.double(), (6, 7), **options)
    expected = sparse_project(flat, 10, seed=1, stream=6, scale=3.0)
    out = kron_grad_project(
        acts.to(device), errs.to(device), (6, 7), **options, sketch_dim=10, scale=3.0, backend=backend
    )
    assert out.shape == (3, 10) and out.dtype == torch.float32
    close(out.cpu(), expected, acts, errs, {"kernel_size": 3}, kind, scale=3.0)


# Moments


def variance_of_signs(G, k_out, k_in):
    """Var |Y|^2 for scale (k_out k_in)^-0.5, as documented."""

    def v(S):
        return 2 * S.square().sum() - 2 * S.diagonal().square().sum()

    A, C, n = G @ G.T, G.T @ G, G.square().sum()
    w = (3 * G.square().sum(1).square() - 2 * G.pow(4).sum(1)).sum()
    return ((k_in - 1) * v(A) + (k_out - 1) * v(C) + 2 * n**2 + 3 * v(C) - 2 * w) / (k_out * k_in)


@pytest.mark.parametrize(("k_out", "k_in"), ((1, 1), (2, 1), (1, 2)))
def test_variance_formula_over_every_sign_matrix(k_out, k_in):
    G = torch.randn(3, 3, dtype=torch.float64)

    def every(k):
        return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3 * k)), dtype=torch.float64).view(-1, k, 3)

    Y = torch.einsum("xko,oi,yli->xykl", every(k_out), G, every(k_in))
    norms = Y.square().sum((2, 3)) / (k_out * k_in)
    torch.testing.assert_close(norms.mean(), G.square().sum())
    torch.testing.assert_close(norms.var(correction=0), variance_of_signs(G, k_out, k_in))
    n, A = G.square().sum(), G @ G.T
    bound = 2 * A.square().sum() * (1 / k_out + 1 / k_in) + 8 * n**2 / (k_out * k_in)
    assert variance_of_signs(G, k_out, k_in) <= bound


@pytest.mark.parametrize("tokens", (1, 6))
def test_inner_products_over_seeds(tokens):
    """Unbiased, with the documented variance: |g|^2 far from dense for one token (rank one), nearer for six."""
    acts, errs, (k_out, k_in), seeds = torch.randn(2, tokens, 12), torch.randn(2, tokens, 10), (8, 6), 500
    grads = (errs.mT @ acts).double()
    scale = (k_out * k_in) ** -0.5
    Y = torch.stack(
        [kron_grad_project(acts, errs, (k_out, k_in), seed=s, scale=scale, backend="cpu") for s in range(seeds)]
    ).double()
    norms, inner = Y[:, 0].square().sum(1), (Y[:, 0] * Y[:, 1]).sum(1)
    variance, n = variance_of_signs(grads[0], k_out, k_in), grads[0].square().sum()
    assert abs(norms.mean() - n) < 4 * (variance / seeds).sqrt()
    assert 0.8 < norms.var() / variance < 1.25
    assert abs(inner.mean() - (grads[0] * grads[1]).sum()) < 4 * inner.std() / seeds**0.5
    dense = 2 * n**2 / (k_out * k_in)
    assert (variance > 5 * dense) if tokens == 1 else (variance < 4 * dense)


@pytest.mark.parametrize(("kind", "sketch_dim"), (("gaussian", None), ("mask", None), ("rademacher", 16), ("mask", 16)))
def test_expectation_of_the_other_kinds_over_seeds(kind, sketch_dim):
    acts, errs, (k_out, k_in), seeds = torch.randn(1, 3, 256), torch.randn(1, 3, 256), (5, 6), 100
    n = (errs.mT @ acts).square().sum()
    kept = k_out * k_in / 2**16 if kind == "mask" else k_out * k_in
    options = {"kind": kind, "sketch_dim": sketch_dim, "scale": kept**-0.5}
    norms = torch.stack(
        [kron_grad_project(acts, errs, (k_out, k_in), seed=s, **options).square().sum() for s in range(seeds)]
    )
    assert abs(norms.mean() - n) < 4 * norms.std() / seeds**0.5


def test_streams_and_seeds_give_other_matrices_and_the_sides_differ():
    acts, errs = torch.eye(6)[:, None], torch.eye(6)[:, None]
    outs = [
        kron_grad_project(acts, errs, (6, 6), seed=s, stream=t) for s, t in ((0, 0), (1, 0), (0, 1), (0, 2**31 - 1))
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outs, 2))
    p_out, p_in = matrices("rademacher", (6, 6), 6, 6)
    assert not torch.equal(p_out, p_in)
