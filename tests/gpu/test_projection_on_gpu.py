"""The projections on a real GPU, CUDA and Triton: what the emulator and the interpreter cannot show."""

import os

import on_gpu
import pytest
import torch

from pyattr import backends, ops
from pyattr.reference.hadamard_project import hadamard_matrix

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read by the first matmul: makes those of the tests deterministic
DENSE = ("rademacher_project", "gaussian_project")
OPS = (*DENSE, "sparse_project")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# relative to sum_p |g|
ERROR = {"rademacher_project": 2.0**-19, "gaussian_project": 2e-6 + 2.0**-18, "sparse_project": 2.0**-20}
FULL = 35_746_307  # parameters of the DDPM U-Net for CIFAR-10


both = on_gpu.both("rademacher_project")
needs_cuda = on_gpu.needs("rademacher_project", "cuda")
each_op = pytest.mark.parametrize("op", OPS)
each_dense_op = pytest.mark.parametrize("op", DENSE)


def project(op, grads, proj_dim, backend, **options):
    if op == "sparse_project":
        options = {"nonzeros": min(3, proj_dim), "num_columns": 2**39} | options
    return getattr(ops, op)(grads, proj_dim, backend=backend, **options)


def matrix(op, rows, columns, seed=0, stream=0):
    entries = ops.sign_matrix if op == "rademacher_project" else ops.normal_matrix
    return entries(rows, columns, seed, stream).to("cuda", torch.float64)


def assert_close(op, out, grads, **options):
    expected = project(op, grads.double(), out.shape[1], "reference", **options)
    bound = ERROR[op] * abs(options.get("scale", 1.0)) * grads.double().abs().sum(1, keepdim=True)
    assert ((out - expected).abs() <= bound).all()


def need_memory(gib):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


@both
@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_samples", "num_columns", "proj_dim", "column_offset"),
    [(1, 1, 1, 0), (3, 300, 40, 5), (8, 5000, 257, 128), (33, 129, 512, 77), (100, 70_001, 600, 641)],
)
def test_values(backend, op, dtype, num_samples, num_columns, proj_dim, column_offset):
    grads = torch.randn(num_samples, num_columns, device="cuda").to(dtype)
    options = {"seed": 2**32 - 1, "stream": 3, "column_offset": column_offset, "scale": 0.5}
    assert_close(op, project(op, grads, proj_dim, backend, **options), grads, **options)


@both
def test_signs_bit_for_bit(backend):
    for offset in (0, 100, 2**39 - 1000):
        out = project("rademacher_project", torch.eye(1000, device="cuda"), 700, backend, seed=5, column_offset=offset)
        assert torch.equal(out.double(), matrix("rademacher_project", range(700), range(offset, offset + 1000), 5).T)


@both
def test_normal_entries(backend):
    for offset in (0, 3, 2**34 - 1000):
        out = project("gaussian_project", torch.eye(1000, device="cuda"), 700, backend, seed=5, column_offset=offset)
        expected = matrix("gaussian_project", range(700), range(offset, offset + 1000), 5).T
        assert (out - expected).abs().max() <= 2e-6


@both
@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_batch_or_repetition(backend, op, dtype):
    grads = torch.randn(150, 200_000, device="cuda").to(dtype)
    whole = project(op, grads, 300, backend, column_offset=50)
    assert torch.equal(project(op, grads, 300, backend, column_offset=50), whole)
    for sizes in ([1, 7, 8, 16, 32, 64, 22], [64, 64, 22], [149, 1]):
        parts = [project(op, part, 300, backend, column_offset=50) for part in grads.split(sizes)]
        assert torch.equal(torch.cat(parts), whole)


@both
@each_op
def test_bits_do_not_depend_on_what_else_the_gpu_does(backend, op):
    """Beside a kernel that holds part of the device, blocks land elsewhere and at other times."""
    grads = torch.randn(16, 300_000, device="cuda")
    alone = project(op, grads, 512, backend)
    load, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(load):
        for _ in range(20):
            busy = busy @ busy * 1e-4
    assert torch.equal(project(op, grads, 512, backend), alone)
    torch.cuda.synchronize()


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column_offset", [0, 1, 2, 4, 129])
def test_layouts_give_the_same_bits(backend, dtype, column_offset):
    op, grads = "rademacher_project", torch.randn(9, 4000, device="cuda").to(dtype)
    expected = project(op, grads, 100, backend, column_offset=column_offset)
    views = (
        torch.zeros(9, 8000, dtype=dtype, device="cuda")[:, 1::2],
        torch.zeros(18, 4007, dtype=dtype, device="cuda")[::2, 7:],
        torch.zeros(4000, 9, dtype=dtype, device="cuda").T,
        torch.zeros(9, 4003, dtype=dtype, device="cuda")[:, 1:4001],
    )
    for view in views:
        view.copy_(grads)
        assert torch.equal(project(op, view, 100, backend, column_offset=column_offset), expected)


@both
@each_dense_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans(backend, op, dtype):
    grads = torch.randn(4, 3000, device="cuda").to(dtype)
    grads[0, 130] = float("inf")
    grads[1, 7], grads[1, 2900] = float("inf"), float("-inf")
    grads[2, 2999] = float("nan")
    out, entries = project(op, grads, 300, backend), matrix(op, range(300), range(3000))
    assert torch.equal(out[0], (float("inf") * entries[:, 130]).float())
    opposed = entries[:, 7] * entries[:, 2900] > 0
    assert out[1][opposed].isnan().all()
    assert torch.equal(out[1][~opposed], (float("inf") * entries[~opposed, 7]).float())
    assert out[2].isnan().all()
    assert_close(op, out[3:], grads[3:])


@both
@each_op
def test_more_than_2_to_the_31_elements(backend, op):
    """B * P = 2.3e9 and 4.6e9 as a U-Net's batch gives them: each row as it comes out alone."""
    need_memory(14)
    grads = torch.randn(FULL, device="cuda").to(torch.bfloat16).expand(130, FULL).contiguous()
    grads[129, FULL - 1] = 1000
    for num_samples in (64, 130):
        out = project(op, grads[:num_samples], 64, backend)
        assert torch.equal(out[:1].expand(63, 64), out[:63])
    assert torch.equal(out[129:], project(op, grads[129:], 64, backend))
    assert not torch.equal(out[129], out[128])


@both
@each_dense_op
def test_columns_beyond_2_to_the_31(backend, op):
    need_memory(10)
    columns = [0, 2**31 - 1, 2**31, 2**31 + 299]
    grads = torch.zeros(2, 2**31 + 300, dtype=torch.bfloat16, device="cuda")
    grads[0, columns], grads[1, columns] = 1, -1
    out = project(op, grads, 40, backend)
    expected = matrix(op, range(40), columns).sum(1)
    assert (out[0] - expected).abs().max() <= 1e-5 and torch.equal(out[1], -out[0])


@both
def test_full_size_against_the_definition(backend):
    need_memory(12)
    grads = torch.randn(16, FULL, device="cuda")
    out = project("rademacher_project", grads, 4096, backend)
    expected = project("rademacher_project", grads.double(), 8, "reference")
    error = (out[:, :8] - expected).norm() / expected.norm()
    assert error < 2e-5


@both
@each_dense_op
def test_more_outputs_than_one_launch_takes(backend, op):
    grads = torch.randn(3, 400, device="cuda")
    out = project(op, grads, 70_000, backend)
    rows = [0, 32_767, 32_768, 65_535, 65_536, 69_999]
    expected = grads.double() @ matrix(op, rows, range(400)).T
    assert ((out[:, rows] - expected).abs() <= ERROR[op] * grads.double().abs().sum(1, keepdim=True)).all()


@both
@each_op
def test_runs_on_the_callers_stream(backend, op):
    grads, ready = torch.zeros(4, 1000, device="cuda"), torch.randn(4, 1000, device="cuda")
    expected = project(op, ready, 64, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: the copy comes after what another stream would have read
        grads.copy_(ready)
        out = project(op, grads, 64, backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@both
@each_op
def test_captured_in_a_graph(backend, op):
    grads = torch.randn(4, 1000, device="cuda")
    project(op, grads, 64, backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = project(op, grads, 64, backend)
    grads.copy_(torch.randn(4, 1000))
    graph.replay()
    assert torch.equal(out, project(op, grads, 64, backend))


@both
def test_inputs_on_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    grads = torch.randn(4, 1000, device="cuda:1")
    with torch.cuda.device(0):
        out = project("rademacher_project", grads, 64, backend)
        assert torch.cuda.current_device() == 0
    assert out.device == grads.device
    assert torch.equal(out.cpu(), project("rademacher_project", grads.to("cuda:0"), 64, backend).cpu())


@both
def test_backends_agree(backend):
    """The CPU's result is the exact float32 one; GPUs differ from it by rounding."""
    grads = torch.randn(20, 50_000)
    here = project("rademacher_project", grads, 300, None)
    there = project("rademacher_project", grads.cuda(), 300, backend).cpu()
    assert ((here - there).abs() <= 2.0**-17 * grads.abs().sum(1, keepdim=True)).all()


@both
@each_op
def test_cupy_in_cupy_out(backend, op):
    cupy = pytest.importorskip("cupy")
    grads = torch.randn(5, 300, device="cuda")
    for view in (cupy.asarray(grads), cupy.asarray(grads.T.contiguous()).T):
        out = project(op, view, 33, backend)
        assert isinstance(out, cupy.ndarray)
        assert torch.equal(torch.as_tensor(out, device="cuda"), project(op, grads, 33, backend))


@both
def test_gradient_is_the_transpose(backend):
    grads = torch.randn(3, 500, device="cuda", requires_grad=True)
    out = project("rademacher_project", grads, 40, backend)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, grads, weights)
    expected = weights.double() @ matrix("rademacher_project", range(40), range(500))
    assert (grad - expected).abs().max() <= 1e-4


def counts(num_samples, num_columns, dtype=torch.float32):
    """Whole numbers: their sums are exact in any order."""
    return torch.randint(-9, 10, (num_samples, num_columns), device="cuda").to(dtype)


def assert_sparse_equal(backend, grads, proj_dim, **options):
    out = project("sparse_project", grads, proj_dim, backend, **options)
    expected = project("sparse_project", grads.double(), proj_dim, "reference", **options).float()
    assert torch.equal(out.nan_to_num(-12345.0), expected.nan_to_num(-12345.0))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nonzeros", range(1, 9))
def test_sparse_values_exactly(backend, dtype, nonzeros):
    """Odd and even widths, one lane to 32, ragged offsets, every number of samples that share a thread."""
    for proj_dim in (nonzeros, 45, 1000, 4096, 4128, 40_000):
        for num_samples in (1, 7, 24):
            grads = counts(num_samples, 150_001, dtype)
            assert_sparse_equal(backend, grads, proj_dim, nonzeros=nonzeros, seed=2**32 - 1, column_offset=2**38 + 77)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj_dim", [45, 4096])
def test_sparse_layouts_and_specials(backend, dtype, proj_dim):
    grads = counts(9, 40_000, dtype)
    grads[0, 130], grads[1, 7], grads[2, 39_999] = float("inf"), float("-inf"), float("nan")
    views = (
        torch.zeros(9, 80_000, dtype=dtype, device="cuda")[:, 1::2],
        torch.zeros(18, 40_007, dtype=dtype, device="cuda")[::2, 7:],
        torch.zeros(40_000, 9, dtype=dtype, device="cuda").T,
        torch.zeros(9, 40_003, dtype=dtype, device="cuda")[:, 1:40_001],
    )
    for view in (grads, *views):
        view.copy_(grads)
        assert_sparse_equal(backend, view, proj_dim, column_offset=129)


@both
@pytest.mark.parametrize("proj_dim", [40, 4096, 2**20, 2**20 + 1, 2**31])
def test_sparse_beyond_32_bits(backend, proj_dim):
    """Columns past 2^31, outputs up to 2^31, B * D past 2^31."""
    need_memory(10 + 3 * 4 * proj_dim / 2**30)
    columns = [0, 2**31 - 1, 2**31, 2**31 + 299]
    grads = torch.zeros(2, 2**31 + 300, dtype=torch.bfloat16, device="cuda")
    grads[0, columns], grads[1, columns] = 1, -1
    out = project("sparse_project", grads, proj_dim, backend)
    rows, signs = ops.sketch_entries(columns, proj_dim, nonzeros=3)
    found, places = torch.unique(rows, return_inverse=True)
    expected = torch.zeros(len(found)).index_add_(0, places.flatten(), signs.flatten()).cuda()
    assert torch.equal(out[0, found.cuda()], expected) and torch.equal(out[1, found.cuda()], -expected)
    assert torch.count_nonzero(out) == 2 * torch.count_nonzero(expected)


@both
@pytest.mark.parametrize("proj_dim", [4096, 2**20])
def test_sparse_full_size_against_the_definition(backend, proj_dim):
    need_memory(12)
    grads = torch.randn(16, FULL, device="cuda")
    out = project("sparse_project", grads, proj_dim, backend, nonzeros=4)
    expected = project("sparse_project", grads.double(), proj_dim, "reference", nonzeros=4)
    assert (out - expected).norm() / expected.norm() < 2e-6


# The Hadamard projection: sums of whole numbers below 2^24 are exact in any order.


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_samples", "num_columns", "proj_dim"),
    [(1, 1, 1), (3, 100, 128), (9, 5000, 8192), (2, 300_001, 4096), (33, 70_001, 77)],
)
def test_hadamard_values_and_layouts_exactly(backend, dtype, num_samples, num_columns, proj_dim):
    grads = counts(num_samples, num_columns, dtype)
    options = {"seed": 2**32 - 1, "stream": 5, "scale": -0.5}
    expected = ops.hadamard_project(grads.double(), proj_dim, backend="reference", **options).float()
    columns_apart = torch.zeros(num_samples, 2 * num_columns, dtype=dtype, device="cuda")[:, 1::2]
    for view in (grads, grads.T.contiguous().T, columns_apart.copy_(grads)):
        assert torch.equal(ops.hadamard_project(view, proj_dim, backend=backend, **options), expected)


@both
def test_hadamard_bits_do_not_depend_on_batch_or_repetition(backend):
    grads = torch.randn(70, 200_000, device="cuda")
    whole = ops.hadamard_project(grads, 300, backend=backend)
    assert torch.equal(ops.hadamard_project(grads, 300, backend=backend), whole)
    parts = [ops.hadamard_project(part, 300, backend=backend) for part in grads.split([1, 7, 62])]
    assert torch.equal(torch.cat(parts), whole)
    bound = 2.0**-19 * grads.double().abs().sum(1, keepdim=True)
    assert ((whole - ops.hadamard_project(grads.double(), 300, backend="reference")).abs() <= bound).all()


@both
def test_hadamard_more_outputs_than_sums_of_a_launch(backend):
    """D = N = 2^21, more than the 2^20 sums that ranges share: an isometry."""
    grads = torch.randn(9, 2**21, device="cuda")
    out = ops.hadamard_project(grads, 2**21, scale=2.0**-10.5, backend=backend)
    torch.testing.assert_close(out @ out.T, grads @ grads.T, rtol=1e-3, atol=10.0)


@both
def test_hadamard_beyond_32_bits(backend):
    need_memory(12)
    columns = [0, 2**31 - 1, 2**31, 2**31 + 299]
    grads = torch.zeros(2, 2**31 + 300, dtype=torch.bfloat16, device="cuda")
    grads[0, columns], grads[1, columns] = 1, -1
    out = ops.hadamard_project(grads, 40, seed=3, backend=backend)
    entries = hadamard_matrix(torch.arange(40), torch.tensor(columns), grads.shape[1], 3)
    assert torch.equal(out[0].double().cpu(), entries.sum(1)) and torch.equal(out[1], -out[0])


@both
def test_hadamard_on_the_callers_stream(backend):
    grads, ready = torch.zeros(4, 1000, device="cuda"), torch.randn(4, 1000, device="cuda")
    expected = ops.hadamard_project(ready, 64, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        grads.copy_(ready)
        out = ops.hadamard_project(grads, 64, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.gpu
@needs_cuda
def test_a_bad_device_raises():
    module = backends.extension()
    grads, out = torch.zeros(1, 8, device="cuda"), torch.zeros(1, 8, device="cuda")
    arguments = (grads.data_ptr(), 2, 1, 8, 8, 1, out.data_ptr(), 8, 0, 0, 0, 1.0)
    size = module.rademacher_project_cuda_workspace(*arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match="cudaSetDevice failed"):
        module.rademacher_project_cuda(*arguments, workspace.data_ptr(), size, 0, 1000)
    with pytest.raises(ValueError, match="workspace_bytes must be at least"):
        module.rademacher_project_cuda(*arguments, workspace.data_ptr(), size - 1, 0, 0)


@pytest.mark.gpu
@needs_cuda
def test_a_bad_sparse_call_raises():
    module = backends.extension()
    grads, out = torch.zeros(1, 4000, device="cuda"), torch.zeros(1, 8, device="cuda")
    layout = (grads.data_ptr(), 2, 1, 4000, 4000, 1, out.data_ptr())
    size = module.sparse_project_cuda_workspace(*layout, 8, 0, 0, 0, 1, 1.0)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    call = module.sparse_project_cuda
    with pytest.raises(RuntimeError, match="cudaSetDevice failed"):
        call(*layout, 8, 0, 0, 0, 1, 1.0, workspace.data_ptr(), size, 0, 1000)
    with pytest.raises(ValueError, match="workspace_bytes must be at least"):
        call(*layout, 8, 0, 0, 0, 1, 1.0, workspace.data_ptr(), size - 1, 0, 0)
    with pytest.raises(ValueError, match="proj_dim must lie in"):
        call(*layout, 3, 0, 0, 0, 4, 1.0, workspace.data_ptr(), size, 0, 0)
