"""The two-sided projection: the Kronecker product applied to the gradients that torch.func forms, and what it promises."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from pyattr import testing
from pyattr.backends import BackendError
from pyattr.ops import _two_sided, kron_grad_project, normal_matrix, sign_matrix, sparse_project
from pyattr.ops._convolution import check_convolution
from pyattr.ops._precision import full_float32
from pyattr.reference.layer_gradients import conv2d_gradients, linear_gradients
from pyattr.reference.mask_project import mask_indices

BACKENDS = testing.usable_backends("kron_grad_project")
SKETCHING = [name for name in BACKENDS if name in testing.usable_backends("sparse_project")]
FAST = [name for name in BACKENDS if name != "reference"]


def matrices(kind, factor_dims, height, width, seed=0, stream=0):
    """P_out and P_in written out in float64."""
    keys = (seed, 2 * stream), (seed, 2 * stream + 1)
    sizes = tuple(zip(factor_dims, (height, width), keys, strict=True))
    if kind == "mask":
        return [torch.eye(n, dtype=torch.float64)[mask_indices(n, k, *key)] for k, n, key in sizes]
    matrix = {"rademacher": sign_matrix, "gaussian": normal_matrix}[kind]
    return [matrix(range(k), range(n), *key).to(torch.float64) for k, n, key in sizes]


def layer_gradients(layer, acts, errs, bias):
    """[B, O, I] of <layer(acts_b), errs_b> by torch.func, in float64; the bias's as a last column."""
    layer = layer.double()
    parameters = dict(layer.named_parameters())
    rows = 3 if isinstance(layer, nn.Conv2d) else 1  # dimensions of one output

    def value(parameters, sample, err):
        out = functional_call(layer, parameters, sample.reshape(-1, *sample.shape[sample.dim() - rows :]))
        return (out * err.reshape(out.shape)).sum()

    grads = vmap(grad(value), (None, 0, 0))(parameters, acts.double(), errs.double())
    weight = grads["weight"].flatten(2)
    return torch.cat([weight, grads["bias"][:, :, None]], 2) if bias else weight


def close(out, expected, acts, errs, convolution=None, kind="rademacher", scale=1.0):
    """Within the documented bound."""
    sizes = acts.abs(), errs.abs()
    if convolution is None:
        total = linear_gradients(*(t.reshape(t.shape[0], -1 if t.numel() else 0, t.shape[-1]) for t in sizes), True)
    else:
        full = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | convolution
        sizes = (t if t.dim() == 5 else t[:, None] for t in sizes)
        total = conv2d_gradients(*sizes, check_convolution("test", **full), True)
    bound = 2.0**-17 * (40 if kind == "gaussian" else 1) * scale * total.sum((1, 2))[:, None]
    assert ((out.double() - expected).abs() <= bound).all()


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 2, "stride": 3, "dilation": 2},
    {"kernel_size": 3, "padding": 4, "dilation": (1, 2)},  # rows of the output that see nothing but padding
    {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": (2, 1), "groups": 4},
    {"kernel_size": 1},
]


def images_and_errors(convolution, leading, size=(7, 6), channels=4, out_channels=8, dtype=torch.float32):
    layer = nn.Conv2d(channels, out_channels, **convolution)
    acts = torch.randn(*leading, channels, *size)
    shape = layer(acts.reshape(-1, channels, *size)).shape[1:]
    return layer, acts.to(dtype), torch.randn(*leading, *shape).to(dtype)


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


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("kind", ("rademacher", "mask"))
def test_16_bit_inputs_are_accumulated_in_float32(backend, dtype, kind):
    """The result is that of the same numbers in float32; products beyond float16 stay finite."""
    device = testing.device_of(backend)
    _, acts, errs = images_and_errors({"kernel_size": 3}, (2, 2), dtype=dtype)
    acts, errs = (100 * acts).to(device), (1000 * errs).to(device)
    options = {"kernel_size": 3, "bias": True, "kind": kind, "backend": backend}
    out = kron_grad_project(acts, errs, (3, 3), **options)
    assert out.dtype == torch.float32 and out.abs().max() > 65504
    assert torch.equal(out, kron_grad_project(acts.float(), errs.float(), (3, 3), **options))
    mixed = kron_grad_project(acts, errs.float(), (3, 3), **options)  # as autocast leaves them
    assert torch.equal(mixed, out)


@pytest.mark.parametrize("backend", FAST)
def test_autocast_does_not_reach_the_products(backend):
    device = testing.device_of(backend)
    _, acts, errs = images_and_errors({"kernel_size": 3}, (2,))
    for tensors, options in (((acts, errs), {"kernel_size": 3}), ((acts[:, 0], acts[:, 1]), {})):
        tensors = [tensor.to(device) for tensor in tensors]
        expected = kron_grad_project(*tensors, (3, 4), **options, backend=backend)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(kron_grad_project(*tensors, (3, 4), **options, backend=backend), expected)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_full_float32_turns_the_short_formats_off_and_puts_them_back(device):
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    switches = switches if device == "cuda" else (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        with pytest.raises(KeyError), full_float32(torch.device(device)):
            assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
            raise KeyError
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


# Layouts and special values


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ("rademacher", "mask"))
@pytest.mark.parametrize("groups", (1, 2))
def test_not_contiguous(backend, kind, groups):
    device = testing.device_of(backend)
    _, acts, errs = images_and_errors({"kernel_size": 3, "groups": groups}, (2, 3))
    options = {"kernel_size": 3, "groups": groups, "kind": kind, "backend": backend}
    expected = kron_grad_project(acts.to(device), errs.to(device), (4, 5), **options).cpu()
    strided = acts.movedim(2, 4).contiguous().movedim(4, 2), errs.movedim(0, 3).contiguous().movedim(3, 0)
    for a, e in (strided, (acts.repeat(1, 1, 1, 1, 2)[..., :6], errs.expand(2, *errs.shape)[1])):
        out = kron_grad_project(a.to(device), e.to(device), (4, 5), **options).cpu()
        close(out, expected.double(), acts, errs, {"kernel_size": 3, "groups": groups})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_not_finite_values_reach_the_whole_sample_and_no_other(backend, value):
    device = testing.device_of(backend)
    for convolution, kernel in ((None, {}), ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1})):
        for which in range(2):
            if convolution is None:
                tensors = [torch.randn(5, 4, 6), torch.randn(5, 4, 3)]
            else:
                tensors = list(images_and_errors(convolution, (5,))[1:])
            tensors[which][2].view(-1)[7] = value
            out = kron_grad_project(*(t.to(device) for t in tensors), (3, 4), **kernel, backend=backend).cpu()
            assert not out[2].isfinite().any()
            assert out[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", (False, True))
def test_mask_reads_only_what_it_keeps(backend, bias):
    device = testing.device_of(backend)
    acts, errs = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    options = {"kind": "mask", "bias": bias, "backend": backend}
    expected = kron_grad_project(acts.to(device), errs.to(device), (2, 3), **options)
    kept_rows, kept_columns = mask_indices(5, 2, 0, 0).tolist(), mask_indices(6 + bias, 3, 0, 1).tolist()
    acts[:, :, [i for i in range(6) if i not in kept_columns]] = float("nan")
    errs[:, :, [o for o in range(5) if o not in kept_rows]] = float("inf")
    assert torch.equal(kron_grad_project(acts.to(device), errs.to(device), (2, 3), **options), expected)


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
    acts, errs, (k_out, k_in), seeds = torch.randn(2, tokens, 12), torch.randn(2, tokens, 10), (8, 6), 800
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
    acts, errs, (k_out, k_in), seeds = torch.randn(1, 3, 256), torch.randn(1, 3, 256), (5, 6), 150
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


# Derivatives


@pytest.mark.parametrize("options", ({}, {"kind": "mask", "bias": True}, {"sketch_dim": 3}))
def test_gradcheck(options):
    acts, errs = (torch.randn(2, 2, n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    assert torch.autograd.gradcheck(
        lambda a, e: kron_grad_project(a, e, (2, 2), **options), (acts, errs), check_forward_ad=True, fast_mode=True
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ("rademacher", "mask"))
def test_derivatives_of_the_composed_backends(backend, kind):
    _, acts, errs = images_and_errors({"kernel_size": 3, "groups": 2}, (2, 2))
    options = {"kernel_size": 3, "groups": 2, "bias": True, "kind": kind}
    bars = []
    for name, device, dtype in (
        (backend, testing.device_of(backend), torch.float32),
        ("reference", "cpu", torch.float64),
    ):
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in (acts, errs)]
        out = kron_grad_project(*inputs, (3, 4), **options, backend=name)
        bars.append(torch.autograd.grad(out.square().sum(), inputs))
    for found, expected in zip(*bars, strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# Arrays and errors


def test_numpy_in_numpy_out():
    acts, errs = np.random.randn(3, 4, 5).astype(np.float32), np.random.randn(3, 4, 2).astype(np.float32)
    expected = kron_grad_project(torch.from_numpy(acts), torch.from_numpy(errs), (2, 3)).numpy()
    errs.setflags(write=False)
    out = kron_grad_project(acts, errs, (2, 3))
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    np.testing.assert_array_equal(out, expected)


def test_float64_stays_float64_on_the_reference():
    acts, errs = torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float64)
    assert kron_grad_project(acts, errs, (2, 2)).dtype == torch.float64
    with pytest.raises(BackendError, match=r"errs is torch\.float64, this backend takes float16, bfloat16 and float32"):
        kron_grad_project(acts, errs, (2, 2), backend="cpu")


def linear(**change):
    return {"acts": torch.zeros(2, 3, 5), "errs": torch.zeros(2, 3, 4), "factor_dims": (2, 2), **change}


def conv(**change):
    acts, errs = torch.zeros(2, 4, 6, 7), torch.zeros(2, 8, 4, 5)
    return {"acts": acts, "errs": errs, "factor_dims": (2, 2), "kernel_size": 3, **change}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        (linear(acts=[[1.0]]), TypeError, "acts must be a torch tensor, NumPy array or CuPy array, got list"),
        (
            linear(errs=np.zeros((2, 3, 4), np.float32)),
            TypeError,
            "errs must be an array of the same library as acts (torch), got numpy",
        ),
        (
            linear(errs=torch.eye(3).to_sparse()),
            TypeError,
            "errs must be a dense (strided) tensor, got layout torch.sparse_coo",
        ),
        (
            linear(acts=torch.zeros(2, 3, 5, dtype=torch.int32)),
            TypeError,
            "acts must be float16, bfloat16, float32 or float64, got torch.int32",
        ),
        (linear(errs=torch.zeros(2, 3, 4, device="meta")), ValueError, "errs must be on the device of acts, cpu, got meta"),
        (linear(acts=torch.zeros(5)), ValueError, "acts must have shape [B, ..., I], got [5]"),
        (linear(errs=torch.zeros(4)), ValueError, "errs must have shape [B, ..., O], got [4]"),
        (linear(errs=torch.zeros(2, 4)), ValueError, "errs must have the leading dimensions of acts, [2, 3], got [2]"),
        (linear(acts=torch.zeros(2, 3, 0)), ValueError, "acts must have at least one channel, got none"),
        (
            linear(stride=2),
            ValueError,
            "kernel_size must be given with stride, padding, dilation or groups, got None",
        ),
        (conv(acts=torch.zeros(2, 6, 7)), ValueError, "acts must have shape [B, C, H, W] or [B, K, C, H, W], got [2, 6, 7]"),
        (conv(errs=torch.zeros(2, 8)), ValueError, "errs must have shape [B, O, Ho, Wo] or [B, K, O, Ho, Wo], got [2, 8]"),
        (
            conv(errs=torch.zeros(2, 1, 8, 4, 5)),
            ValueError,
            "errs must have the leading dimensions of acts, [2], got [2, 1]",
        ),
        (conv(errs=torch.zeros(2, 0, 4, 5)), ValueError, "errs must have at least one channel, got none"),
        (conv(groups=3), ValueError, "acts must have C divisible by groups = 3, got C = 4"),
        (conv(groups=4, errs=torch.zeros(2, 6, 4, 5)), ValueError, "errs must have O divisible by groups = 4, got O = 6"),
        (conv(dilation=3), ValueError, "acts must have images that the kernel fits into, got [6, 7]"),
        (conv(padding=1), ValueError, "errs must have maps of [6, 7] for these images, got [4, 5]"),
        (conv(kernel_size=(3, 3, 3)), ValueError, "kernel_size must be an integer or a pair of them, got 3 numbers"),
        (conv(kernel_size=0), ValueError, "kernel_size must lie in [1, 2147483647], got 0"),
        (conv(padding="same"), TypeError, "padding must be an integer, got str"),
        (conv(stride=(1, 0.5)), TypeError, "stride must be an integer, got float"),
        (linear(bias=1), TypeError, "bias must be True or False, got int"),
        (linear(kind="sparse"), ValueError, "kind must be one of rademacher, gaussian, mask, got 'sparse'"),
        (linear(factor_dims=4), TypeError, "factor_dims must be a pair of integers (k_out, k_in), got 4"),
        (linear(factor_dims=(0, 2)), ValueError, "k_out of factor_dims must lie in [1, 2147483647], got 0"),
        (linear(factor_dims=(2, 2.0)), TypeError, "k_in of factor_dims must be an integer, got float"),
        (linear(kind="mask", factor_dims=(5, 2)), ValueError, "k_out of factor_dims must be at most O = 4 with a mask, got 5"),
        (
            linear(kind="mask", factor_dims=(4, 7), bias=True),
            ValueError,
            "k_in of factor_dims must be at most I = 6 with a mask, got 7",
        ),
        (linear(sketch_dim=0), ValueError, "sketch_dim must lie in [1, 2147483648], got 0"),
        (
            linear(sketch_dim=8, factor_dims=(2**20, 2**20)),
            ValueError,
            "factor_dims must have a product of at most 2^39 with sketch_dim, got (1048576, 1048576)",
        ),
        (linear(seed=-1), ValueError, "seed must lie in [0, 4294967295], got -1"),
        (linear(stream=2**31), ValueError, "stream must lie in [0, 2147483647], got 2147483648"),
        (linear(scale="1"), TypeError, "scale must be a real number, got str"),
        (linear(backend="fast"), ValueError, "backend must be one of cuda, triton, cpu, reference, got 'fast'"),
    ),
)  # fmt: skip
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error) as caught:
        kron_grad_project(**arguments)
    assert str(caught.value) == f"kron_grad_project: {message}"


def test_a_backend_that_cannot_sketch_says_so(monkeypatch):
    report = {"sparse_project": {"cpu": ["not built"], "reference": []}}
    monkeypatch.setattr("pyattr.backends.report", lambda: report)
    with pytest.raises(BackendError, match=r"cpu: sketch_dim: not built$"):
        kron_grad_project(**linear(sketch_dim=3, backend="cpu"))
    assert kron_grad_project(**linear(sketch_dim=3)).shape == (2, 3)  # the reference can
