"""sjlt's interface: the matrix is the one in the buffers, whatever was written into them, on both of its ways."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from pyattr.compat import sjlt
from pyattr.compat.sjlt import SJLTProjection, get_cuda_info, sjlt_projection_cuda, sjlt_transpose_cuda

TOLERANCE = {torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.float32: 2**-18, torch.float64: 2**-45}


def make(original_dim=300, proj_dim=20, c=3, **options) -> SJLTProjection:
    return SJLTProjection(original_dim, proj_dim, c, device="cpu", **options)


def matrix(sketch) -> torch.Tensor:
    """S [P, K] with its scale, from the buffers."""
    dense = torch.zeros(sketch.original_dim, sketch.proj_dim, dtype=torch.float64)
    for j in range(sketch.c):
        rows = torch.arange(sketch.original_dim)
        dense.index_put_((rows, sketch.rand_indices[:, j]), sketch.rand_signs[:, j].double(), accumulate=True)
    return dense / sketch.c**0.5


@pytest.fixture(params=["in order", "sorted"])
def way(request, monkeypatch):
    """The CPU's way of adding, and the GPU's, here on the CPU."""
    if request.param == "sorted":
        monkeypatch.setattr(sjlt, "_add_in_order", sjlt._add_sorted)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sjlt, "CPU_COLUMNS", 7)
    monkeypatch.setattr(sjlt, "ROWS", 2)


def test_by_hand(way):
    sketch = make(4, 3, 2)
    sketch.rand_indices.copy_(torch.tensor([[0, 2], [1, 1], [2, 0], [2, 2]]))
    sketch.rand_signs.copy_(torch.tensor([[1, -1], [1, 1], [-1, -1], [1, -1]]))
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    expected = torch.tensor([[1.0 - 4, 2 + 2, -1 - 4 + 8 - 8]]) * 2**-0.5
    torch.testing.assert_close(sketch(x), expected)
    y = torch.tensor([[1.0, 10.0, 100.0]])
    torch.testing.assert_close(sketch.transpose(y), torch.tensor([[1.0 - 100, 20, -100 - 1, 0]]) * 2**-0.5)


@hypothesis.given(
    rows=st.integers(0, 5),
    original_dim=st.integers(1, 40),
    proj_dim=st.integers(1, 30),
    c=st.integers(1, 20),
    seed=st.integers(0, 100),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_equals_the_dense_matrix(way, small_pieces, rows, original_dim, proj_dim, c, seed, dtype):
    c = min(c, proj_dim)
    generator = torch.Generator().manual_seed(seed)
    sketch = make(original_dim, proj_dim, c, generator=generator)
    x = torch.randn(rows, original_dim, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(rows, proj_dim, generator=generator, dtype=torch.float64).to(dtype)
    dense = matrix(sketch)
    for found, given, by in ((sketch(x), x, dense), (sketch.transpose(y), y, dense.T)):
        assert found.dtype == dtype and found.shape == (rows, by.shape[1])
        error = (found.double() - given.double() @ by).abs()
        assert (error <= TOLERANCE[dtype] * (given.double().abs() @ by.abs() + 2**-24)).all()


def test_long_sums_of_halves_are_added_in_float32(way):
    """100,000 ones into one output: 16-bit sums would stop at 2048 and at 256."""
    sketch = make(100_000, 1, 1)
    sketch.rand_signs.fill_(1)
    assert sketch(torch.ones(1, 100_000, dtype=torch.bfloat16)).item() == 99_840  # the nearest bfloat16 to 100,000
    assert sketch(torch.ones(1, 100_000, dtype=torch.float16) / 2).item() == 49_984  # to 50,000, even


@pytest.mark.parametrize("turn", ["transposed", "strided", "expanded", "flipped columns"])
def test_strides(way, turn):
    sketch, x = make(), torch.randn(300, 6)
    view = {
        "transposed": x.T,
        "strided": torch.randn(12, 600)[::2, ::2],
        "expanded": torch.randn(1, 300).expand(6, 300),
        "flipped columns": torch.randn(6, 300).flip(1),
    }[turn]
    assert torch.equal(sketch(view), sketch(view.contiguous()))
    assert torch.equal(sketch.transpose(sketch(view).T.contiguous().T), sketch.transpose(sketch(view)))


def test_follows_its_buffers_however_they_are_written(way):
    sketch, x = make(), torch.randn(4, 300)
    before = sketch(x)
    sketch.rand_signs.copy_(-sketch.rand_signs)
    assert torch.equal(sketch(x), -before)
    sketch.rand_signs.data.neg_()  # past the version counter
    assert torch.equal(sketch(x), before)
    other = make()
    assert not torch.equal(other(x), before)
    other.load_state_dict(sketch.state_dict())
    assert torch.equal(other(x), before)
    sketch.rand_indices = sketch.rand_indices.flip(0)
    torch.testing.assert_close(sketch(x), (x.double() @ matrix(sketch)).float())


def test_a_seed_gives_sjlts_buffers():
    torch.manual_seed(5)
    indices = torch.randint(0, 20, (300, 3))
    signs = torch.randint(0, 2, (300, 3)) * 2 - 1
    torch.manual_seed(5)
    by_global = make()
    by_generator = make(generator=torch.Generator().manual_seed(5))
    for sketch in (by_global, by_generator):
        assert torch.equal(sketch.rand_indices, indices) and torch.equal(sketch.rand_signs, signs)
        assert sketch.rand_indices.dtype == torch.int64 and sketch.rand_signs.dtype == torch.int8


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_bits_do_not_depend_on_threads_or_other_rows(way, dtype):
    sketch, x = make(70_000, 50, 2), torch.randn(70, 70_000).to(dtype)  # more than one piece of columns, and of rows
    torch.set_num_threads(1)
    alone = torch.cat([sketch(row) for row in x.split([1, 64, 5])])
    torch.set_num_threads(2)
    assert torch.equal(sketch(x), alone)


def test_nan_and_inf_reach_their_outputs_and_no_other(way):
    sketch, x = make(), torch.randn(2, 300)
    x[0, 7], x[1, 9] = float("nan"), float("inf")
    for row, column in ((0, 7), (1, 9)):
        meets = torch.isin(torch.arange(20), sketch.rand_indices[column])
        assert torch.equal(~sketch(x)[row].isfinite(), meets)
    sketch.rand_signs.fill_(1)
    assert sketch(torch.full((1, 300), 6e4, dtype=torch.float16)).isposinf().all()


def test_derivatives():
    sketch = make(9, 4, 2)
    for function, width in ((sketch, 9), (sketch.transpose, 4)):
        x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, (x,))
    x = torch.randn(3, 9)
    dense = matrix(sketch).float()
    jacobian = torch.einsum("ab,pk->akbp", torch.eye(3), dense)
    torch.testing.assert_close(torch.func.jacrev(sketch)(x), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(sketch)(x), jacobian)
    stacked = torch.randn(5, 3, 9)
    assert torch.equal(torch.func.vmap(sketch)(stacked), torch.stack([sketch(rows) for rows in stacked]))


def test_overwritten_buffers_are_not_taken_for_those_of_the_forward_pass():
    sketch, x = make(), torch.randn(2, 300, requires_grad=True)
    y = sketch(x).sum()
    sketch.rand_signs.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_norms_and_inner_products_in_expectation():
    """E <Sx, Sy> = <x, y>: the mean over 400 matrices, within five standard errors."""
    x, y = torch.randn(2, 300, dtype=torch.float64)
    for c in (1, 4):
        products = torch.stack([torch.dot(*sketch(torch.stack([x, y]))) for sketch in (make(c=c) for _ in range(400))])
        assert abs(products.mean() - torch.dot(x, y)) < 5 * products.std() / 20
        assert 0.8 < products.var() / ((x @ x * (y @ y) + (x @ y) ** 2) / 20) < 1.25


def test_the_functions_of_its_extension():
    sketch, x, y = make(), torch.randn(4, 300), torch.randn(4, 20)
    buffers = (sketch.rand_indices, sketch.rand_signs)
    [projected] = sjlt_projection_cuda(x, *buffers, 20, 3, 1024, 84)
    [back] = sjlt_transpose_cuda(y, *buffers, 300, 3, 1024, 84)
    assert torch.equal(projected, sketch(x)) and torch.equal(back, sketch.transpose(y))
    with pytest.raises(
        ValueError, match=r"sjlt_projection_cuda: rand_indices must have shape \[P, c = 2\], got \[300, 3\]"
    ):
        sjlt_projection_cuda(x, *buffers, 20, 2)
    with pytest.raises(TypeError, match=r"rand_signs must be torch\.int8 on cpu, got torch.int64 on cpu"):
        sjlt_projection_cuda(x, buffers[0], buffers[0], 20, 3)
    with pytest.raises(ValueError, match="original_dim must be 300 as in rand_indices, got 301"):
        sjlt_transpose_cuda(y, *buffers, 301, 3)
    with pytest.raises(ValueError, match=r"rand_indices must lie in \[0, 10\), got 0..19"):
        sjlt_projection_cuda(x, *buffers, 10, 3)
    with pytest.raises(ValueError, match=r"rand_indices must lie in \[0, 19\), got 0..19"):
        sjlt_transpose_cuda(y[:, :19], *buffers, 300, 3)


def test_no_columns():
    none = torch.empty(0, 2, dtype=torch.int64)
    [projected] = sjlt_projection_cuda(torch.empty(3, 0), none, none.to(torch.int8), 4, 2)
    assert torch.equal(projected, torch.zeros(3, 4))


def test_variance_of_inner_products():
    """As stated, indices of a column that meet included: without their term it would be half of it."""
    x, y = torch.tensor([[2.0, 1.0, 0.5, 0.0]]), torch.tensor([[1.5, -1.0, 1.0, 1.0]])
    products = []
    for seed in range(2000):
        sketch = make(4, 5, 3, generator=torch.Generator().manual_seed(seed))
        products.append((sketch(x) * sketch(y)).sum())
    products, inner, norms = torch.stack(products), (x * y).sum(), x.square().sum() * y.square().sum()
    variance = (norms + inner**2 - 2 / 3 * (x * y).square().sum()) / 5
    assert abs(products.mean() - inner) < 4 * (variance / 2000) ** 0.5
    assert abs(products.var() / variance - 1) < 0.15
    assert (norms + inner**2 - 2 * (x * y).square().sum()) / 5 < 0.6 * variance


def test_it_is_saved_and_loaded(tmp_path):
    sketch, x = make(), torch.randn(2, 300)
    other = make()
    assert not torch.equal(other(x), sketch(x))
    other.load_state_dict(sketch.state_dict())
    torch.save(sketch, tmp_path / "whole")
    for copied in (other, copy.deepcopy(sketch), torch.load(tmp_path / "whole", weights_only=False)):
        assert torch.equal(copied(x), sketch(x)) and copied.c == 3


def test_what_sjlt_says_of_a_gpu(monkeypatch):
    assert sjlt.EXTENSION_AVAILABLE is True and sjlt.CUDA_AVAILABLE == torch.cuda.is_available()
    stand_ins = {"is_available": True, "device_count": 2, "is_initialized": True, "current_device": 1}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", "card {}".format)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)  # which would ask the cards
    info = get_cuda_info()
    assert (info["devices"], info["device_count"], info["current_device"]) == (["card 0", "card 1"], 2, 1)
    assert {"cuda_version", "cudnn_version"} < set(info)


def test_attributes():
    sketch = make(100, 25, 4, threads=100, fixed_blocks=9)
    assert (sketch.original_dim, sketch.proj_dim, sketch.c) == (100, 25, 4)
    assert (sketch.threads, sketch.fixed_blocks, sketch.normalization_factor) == (96, 9, 0.5)
    assert sketch.device == torch.device("cpu")
    assert sketch.get_compression_ratio() == 4.0 and sketch.get_sparsity_ratio() == 1 - 4 / 25
    assert repr(sketch) == "SJLTProjection(original_dim=100, proj_dim=25, c=4, device=cpu)"
    assert set(sketch.state_dict()) == {"rand_indices", "rand_signs"}
    assert get_cuda_info()["extension_available"] is True
    assert get_cuda_info()["cuda_available"] == torch.cuda.is_available()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 10), "original_dim must lie in .*, got 0"),
        ((10, 0), "proj_dim must lie in .*, got 0"),
        ((10, 5, 0), "c must lie in .*, got 0"),
        ((10, 5, 6), "proj_dim must be at least c = 6, got 5"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=f"SJLTProjection: {message}"):
        SJLTProjection(*arguments, device="cpu")
    for wrong in (2.0, "2", True):
        with pytest.raises(TypeError, match="SJLTProjection: c must be an integer, got "):
            SJLTProjection(10, 5, wrong, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(RuntimeError, match="SJLTProjection: torch sees no CUDA device; pass device='cpu'"):
        SJLTProjection(10, 5)


def test_input_errors():
    sketch = make()
    with pytest.raises(
        ValueError, match=r"SJLTProjection.forward: the input must have shape \[B, 300\], got \[2, 20\]"
    ):
        sketch(torch.ones(2, 20))
    with pytest.raises(ValueError, match=r"SJLTProjection.transpose: the input must have shape \[B, 20\], got \[20\]"):
        sketch.transpose(torch.ones(20))
    with pytest.raises(TypeError, match=r"SJLTProjection.forward: the input must be float16, .* got torch.int64"):
        sketch(torch.ones(2, 300, dtype=torch.int64))
    for wrong, name in ((torch.ones(2, 300).numpy(), "ndarray"), (torch.ones(2, 300).to_sparse(), "torch.sparse_coo")):
        with pytest.raises(TypeError, match=f"SJLTProjection.forward: the input must be a dense tensor, got {name}"):
            sketch(wrong)
    sketch.rand_indices[5, 1] = 20
    with pytest.raises(ValueError, match=r"SJLTProjection.forward: rand_indices must lie in \[0, 20\), got 0..20"):
        sketch(torch.ones(2, 300))
