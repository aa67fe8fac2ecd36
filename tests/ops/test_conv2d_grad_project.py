"""Fused projection of a convolution's gradients: the projection of vmap(grad)'s flat gradient, without its patches."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from pyattr import ops, testing
from pyattr.ops import _layers, conv2d_grad_project
from pyattr.ops._layers import Layer

BACKENDS = testing.usable_backends("conv2d_grad_project")
FAST = [name for name in BACKENDS if name != "reference"]
PROJECT = {
    "rademacher": ops.rademacher_project,
    "gaussian": ops.gaussian_project,
    "sparse": ops.sparse_project,
    "multisketch": ops.multisketch_project,
}


def make(conv, batch, views, height, width, device="cpu"):  # -> acts [B, K, C, H, W], errs [B, K, O, H', W']
    acts = torch.randn(batch, views, conv.in_channels, height, width)
    errs = torch.randn(batch, views, *conv(acts[0]).shape[1:])
    return acts.to(device), errs.to(device)


def flat_gradient(conv, acts, errs):  # -> [B, P] float64, by vmap(grad), weight before bias
    conv = conv.double()

    def loss(parameters, x, e):
        return (torch.func.functional_call(conv, parameters, (x,)) * e).sum()

    parameters = {name: p.detach() for name, p in conv.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, acts.double().cpu(), errs.double().cpu())
    conv.float()
    return torch.cat([grads[name].flatten(1) for name in parameters], 1)


def project(conv, acts, errs, proj_dim, backend, **options):
    return conv2d_grad_project(
        acts, errs, proj_dim, conv.kernel_size, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups, bias=conv.bias is not None, backend=backend, **options,
    )  # fmt: skip


def check(conv, acts, errs, proj_dim, backend, kind, column_offset=0, **options):
    flat = flat_gradient(conv, acts, errs)
    total = column_offset + flat.shape[1]
    out = project(
        conv, acts, errs, proj_dim, backend, kind=kind, column_offset=column_offset, num_columns=total, **options
    )
    extra = {"num_columns": total} if kind in ("sparse", "multisketch") else {}
    expected = PROJECT[kind](flat, proj_dim, column_offset=column_offset, **extra, **options)
    assert out.shape == (len(acts), proj_dim) and out.dtype == torch.float32
    budget = (acts.double().flatten(1).norm(dim=1) * errs.double().flatten(1).norm(dim=1)).cpu() * flat.shape[1] ** 0.5
    budget = (budget + flat.abs().sum(1)) * (4.0 if kind == "gaussian" else 1.0)
    assert ((out.cpu() - expected).abs() <= 2.0**-18 * budget[:, None]).all()


def test_by_hand():
    """A 2 x 2 image, one channel, a 1 x 2 kernel, no padding: each row gives one place."""
    acts, errs = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([[[[10.0], [100.0]]]])
    signs = ops.sign_matrix(range(5), range(3), 8)
    expected = 310 * signs[:, 0] + 420 * signs[:, 1] + 110 * signs[:, 2]  # 10 * 1 + 100 * 3, 10 * 2 + 100 * 4, the bias
    for backend in BACKENDS:
        device = testing.device_of(backend)
        out = conv2d_grad_project(acts.to(device), errs.to(device), 5, (1, 2), bias=True, seed=8, backend=backend)
        assert torch.equal(out[0].cpu(), expected)


CONVOLUTIONS = {
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "1x1": lambda: nn.Conv2d(6, 9, 1, bias=False),
    "all": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=2, groups=6),
    "wide padding": lambda: nn.Conv2d(2, 3, 2, stride=3, padding=4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PROJECT)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_equals_the_projection_of_the_flat_gradient(backend, kind, name):
    conv = CONVOLUTIONS[name]()
    acts, errs = make(conv, 3, 2, 7, 6, testing.device_of(backend))
    check(conv, acts, errs, 24, backend, kind, 9, seed=4, stream=2, scale=0.5)


@pytest.mark.parametrize("backend", FAST)
@given(
    batch=st.integers(1, 4),
    views=st.integers(1, 3),
    channels=st.integers(1, 5),
    rows=st.integers(1, 8),
    groups=st.integers(1, 3),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    nonzeros=st.integers(1, 3),
)
def test_sketches_of_any_convolution(
    backend, batch, views, channels, rows, groups, size, kernel, stride, padding, dilation, nonzeros
):
    assume(all(s + 2 * p > d * (k - 1) for s, k, p, d in zip(size, kernel, padding, dilation, strict=True)))
    conv = nn.Conv2d(channels * groups, rows * groups, kernel, stride, padding, dilation, groups)
    acts, errs = make(conv, batch, views, *size, testing.device_of(backend))
    check(conv, acts, errs, 96, backend, "sparse", 3, nonzeros=nonzeros, seed=7)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ("sparse", "rademacher"))
def test_more_than_one_block_of_everything(backend, kind):
    """800 positions and 1,350 columns of two views, 40 rows."""
    conv = nn.Conv2d(150, 40, 3, padding=1)
    acts, errs = make(conv, 2, 2, 20, 20, testing.device_of(backend))
    check(conv, acts, errs, 128, backend, kind, 1000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("sparse", "rademacher"))
def test_one_timestep_and_strides(backend, kind):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    acts, errs = make(conv, 3, 1, 6, 8, testing.device_of(backend))
    expected = project(conv, acts, errs, 40, backend, kind=kind)
    torch.testing.assert_close(project(conv, acts[:, 0], errs[:, 0], 40, backend, kind=kind), expected)
    last = acts[:, 0].contiguous(memory_format=torch.channels_last), errs[:, 0].mT.contiguous().mT
    torch.testing.assert_close(project(conv, *last, 40, backend, kind=kind), expected)
    assert torch.equal(project(conv, *last, 40, backend, kind=kind).isnan(), expected.isnan())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_are_summed_in_float32(backend, dtype):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    acts, errs = make(conv, 2, 1, 12, 12, testing.device_of(backend))
    check(conv, acts.to(dtype), errs.to(dtype), 40, backend, "sparse")


def test_timesteps_are_summed():
    conv = nn.Conv2d(4, 6, 3, stride=2)
    acts, errs = make(conv, 3, 5, 9, 9)
    each = sum(project(conv, acts[:, k], errs[:, k], 40, None, kind="sparse") for k in range(5))
    torch.testing.assert_close(project(conv, acts, errs, 40, None, kind="sparse"), each, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
def test_sketches_have_the_same_bits_for_any_threads_and_batch():
    conv = nn.Conv2d(130, 20, 3, padding=1)
    acts, errs = make(conv, 11, 1, 5, 4)
    torch.set_num_threads(1)
    whole = project(conv, acts, errs, 64, "cpu", kind="sparse")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(project(conv, acts, errs, 64, "cpu", kind="sparse"), whole)
    for a, b in ((0, 1), (1, 7), (7, 11)):
        assert torch.equal(project(conv, acts[a:b], errs[a:b], 64, "cpu", kind="sparse"), whole[a:b])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
def test_infinities_of_the_images_do_not_leak_into_the_padding():
    """Zeros times infinity would be NaN: where the kernel sees padding, the entry is the errors of the other places alone."""
    acts, errs = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    acts[0, 0, 0, 0] = float("inf")
    out = conv2d_grad_project(acts, errs, 4096, 3, padding=1, kind="sparse", backend="cpu")
    rows, signs = ops.sketch_entries(range(9), 4096)
    entries = out[0, rows[:, 0]] * signs[:, 0]
    # Taps that ever see pixel (0, 0): rows and columns 0 and 1 of the kernel.
    assert entries.tolist() == [float("inf"), float("inf"), 4, float("inf"), float("inf"), 6, 4, 6, 4]


@pytest.mark.parametrize("backend", FAST)
def test_the_gradient_and_the_patches_are_never_whole(backend, monkeypatch):
    tiles, original = [], Layer.put
    monkeypatch.setattr(
        Layer, "put", lambda self, rows, out, add: tiles.append(out.nbytes) or original(self, rows, out, add)
    )
    conv = nn.Conv2d(256, 300, 3, padding=1, bias=False)
    acts, errs = make(conv, 16, 1, 2, 2, testing.device_of(backend))
    project(conv, acts, errs, 16, backend, kind="sparse")
    if backend == "cpu":
        assert tiles == []
    else:
        assert max(tiles) <= 32 << 20
    tiles.clear()
    project(conv, acts, errs, 16, backend)
    assert max(tiles) <= 32 << 20 and sum(tiles) == 4 * 16 * 300 * 2304


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
def test_the_librarys_products_of_large_maps_take_few_samples_at_a_time(monkeypatch):
    """It copies what goes in and what comes out: both twice, of the samples of one call, stay within the workspace."""
    calls, library = [], _layers._put_grouped

    def noted(layer, out, add):
        calls.append((len(out), 2 * sum(tensor.nbytes for tensor in (layer.acts, layer.errs, out))))
        library(layer, out, add)

    monkeypatch.setattr(_layers, "_put_grouped", noted)
    acts, errs = torch.randn(7, 8, 64, 64), torch.randn(7, 16, 64, 64)
    monkeypatch.setattr(_layers, "WORKSPACE_BYTES", 2 * 2 * (24 * 64 * 64 + 16 * 8 * 9) * 4)  # two samples
    found = conv2d_grad_project(acts, errs, 32, 3, padding=1, backend="cpu")
    assert [samples for samples, _ in calls] == [2, 2, 2, 1]
    assert all(size <= _layers.WORKSPACE_BYTES for _, size in calls)
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    expected = ops.rademacher_project(flat_gradient(conv, acts[:, None], errs[:, None]), 32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


ERRORS = (
    ({"acts": torch.zeros(2, 3)}, ValueError, "acts must have shape [B, C, H, W] or [B, K, C, H, W], got [2, 3]"),
    (
        {"errs": torch.zeros(3, 4, 5, 5)},
        ValueError,
        "errs must have the samples and timesteps of acts, [2, 1], got [3, 1]",
    ),
    (
        {"errs": torch.zeros(2, 4, 5, 4)},
        ValueError,
        "errs must have maps of [5, 5] for these images, got [5, 4]",
    ),
    ({"groups": 2}, ValueError, "acts must have C divisible by groups = 2, got C = 3"),
    ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an integer or a pair of them, got 3 numbers"),
    ({"stride": 0}, ValueError, "stride must lie in [1, 2147483647], got 0"),
    ({"padding": -1}, ValueError, "padding must lie in [0, 2147483647], got -1"),
    ({"kernel_size": 8}, ValueError, "acts must have images that the kernel fits into, got [5, 5]"),
    ({"dilation": 1.5}, TypeError, "dilation must be an integer, got float"),
    ({"kind": "mask"}, ValueError, "kind must be one of rademacher, gaussian, sparse, multisketch, got 'mask'"),
    ({"column_offset": 1, "kind": "multisketch"}, ValueError, "num_columns must be given with column_offset, got None"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "acts": torch.zeros(2, 3, 5, 5),
        "errs": torch.zeros(2, 4, 5, 5),
        "proj_dim": 6,
        "kernel_size": 3,
        "padding": 1,
    } | change
    with pytest.raises(error) as caught:
        conv2d_grad_project(**arguments)
    assert str(caught.value) == f"conv2d_grad_project: {message}"
