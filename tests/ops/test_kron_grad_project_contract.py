"""kron_grad_project: precisions, layouts, values that are not finite, derivatives, arrays, errors."""

import numpy as np
import pytest
import torch
from kron_layers import close, images_and_errors

from pyattr import testing
from pyattr.backends import BackendError
from pyattr.ops import kron_grad_project
from pyattr.ops._precision import full_float32
from pyattr.reference.mask_project import mask_indices

BACKENDS = testing.usable_backends("kron_grad_project")
FAST = [name for name in BACKENDS if name != "reference"]

# Precision


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


# Derivatives


@pytest.mark.parametrize("options", ({}, {"kind": "mask", "bias": True}, {"sketch_dim": 3}))
def test_gradcheck(options):
    acts, errs = (torch.randn(2, 2, n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    assert torch.autograd.gradcheck(
        lambda a, e: kron_grad_project(a, e, (2, 2), **options), (acts, errs), check_forward_ad=True, fast_mode=True
    )


@pytest.mark.parametrize("backend", FAST)
def test_a_mask_first_seen_in_inference_mode_serves_autograd(backend):
    """The indices are kept from call to call."""
    acts, errs = (torch.randn(2, 7, device=testing.device_of(backend), requires_grad=True) for _ in range(2))
    options = {"kind": "mask", "seed": 77, "backend": backend}
    with torch.inference_mode():
        first = kron_grad_project(acts, errs, (2, 3), **options)
    out = kron_grad_project(acts, errs, (2, 3), **options)
    assert torch.equal(out, first)
    torch.autograd.grad(out.sum(), (acts, errs))


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
