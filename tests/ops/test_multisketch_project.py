"""The two-stage projection: the two it is made of, its variance, and the checks of its arguments."""

import numpy as np
import pytest
import torch

from pyattr import testing
from pyattr.ops import multisketch_project, rademacher_project, sign_matrix, sketch_entries, sparse_project
from pyattr.reference import multisketch_project as reference

BACKENDS = testing.usable_backends("multisketch_project")
WIDTH = 2**20


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_entry_by_hand(backend):
    """Column i goes to row h with sign s, and from there to every output with the dense matrix's signs of column h."""
    grads = torch.zeros(1, 5, device=testing.device_of(backend))
    grads[0, 3] = 2.0
    rows, signs = sketch_entries([10 + 3], WIDTH, seed=6, stream=1)
    expected = 2.0 * signs[0, 0] * sign_matrix(range(9), rows[0].tolist(), 6, 1)[:, 0]
    out = multisketch_project(grads, 9, seed=6, stream=1, column_offset=10, num_columns=100, backend=backend)
    assert torch.equal(out[0].cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_samples", (0, 1, 17))
def test_is_the_sparse_projection_then_the_dense_one(backend, num_samples):
    grads = testing.make_gradients(num_samples, 3000, device=testing.device_of(backend))
    out = multisketch_project(grads, 6, seed=3, stream=2, scale=0.5, backend=backend)
    between = sparse_project(grads.cpu().double(), WIDTH, seed=3, stream=2)
    expected = rademacher_project(between, 6, seed=3, stream=2, scale=0.5)
    assert out.shape == (num_samples, 6) and out.dtype == torch.float32
    assert ((out.cpu() - expected).abs() <= testing.projection_bound(grads.cpu(), 0.5, 2.0**-17)).all()
    assert torch.equal(multisketch_project(grads[:1], 6, seed=3, stream=2, scale=0.5, backend=backend), out[:1])


def test_pieces_add_up_and_the_dense_stage_can_wait():
    grads = torch.randn(2, 5000)
    whole = multisketch_project(grads, 8, seed=1)
    parts = [
        multisketch_project(grads[:, a:b], 8, seed=1, column_offset=a, num_columns=5000)
        for a, b in ((0, 100), (100, 5000))
    ]
    sketch = sum(
        sparse_project(grads[:, a:b], WIDTH, seed=1, column_offset=a, num_columns=5000)
        for a, b in ((0, 100), (100, 5000))
    )
    bound = testing.projection_bound(grads, 1.0, 2.0**-19)
    assert ((parts[0] + parts[1] - whole).abs() <= bound).all()
    assert ((rademacher_project(sketch, 8, seed=1) - whole).abs() <= bound).all()


def test_mean_and_variance_are_those_of_theory(monkeypatch):
    """With a narrow first stage, so that both stages show, over 500 seeds: v + dense, as the docstring has it."""
    monkeypatch.setattr(reference, "WIDTH", 64)
    torch.manual_seed(2)
    g = torch.randn(300, dtype=torch.float64)
    h = 0.5 * g + torch.randn(300, dtype=torch.float64)
    proj_dim, seeds, pair = 32, 500, torch.stack([g, h])
    out = [reference.multisketch_project(pair, proj_dim, seed, scale=proj_dim**-0.5) for seed in range(seeds)]
    found = torch.stack([(y[0] * y[1]).sum() for y in out])
    pairs = g[:, None] ** 2 * h[None] ** 2 + (g * h)[:, None] * (g * h)[None]
    tile = torch.arange(300) // 64
    first = (pairs * (tile[:, None] != tile[None])).sum() / 64
    second = []
    for seed in range(100):
        z, w = sparse_project(pair, 64, seed=seed)
        second.append(z @ z * (w @ w) + (z @ w) ** 2 - 2 * (z * z * w * w).sum())
    theory = first + torch.stack(second).mean() / proj_dim
    assert abs(found.mean() - g @ h) < 4 * (theory / seeds) ** 0.5
    assert 0.75 < found.var() / theory < 1.3
    assert found.var() > 1.1 * (theory - first)  # the first stage is seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_transpose_is_the_adjoint(backend):
    grads = torch.randn(2, 400, device=testing.device_of(backend), requires_grad=True)
    cotangent = torch.randn(2, 5, device=grads.device)
    out = multisketch_project(grads, 5, seed=2, scale=0.5, backend=backend)
    (bar,) = torch.autograd.grad(out, grads, cotangent)
    torch.testing.assert_close((out * cotangent).sum(), (grads * bar).sum())
    other = torch.randn_like(grads)
    y_dot = torch.func.jvp(
        lambda g: multisketch_project(g, 5, seed=2, scale=0.5, backend=backend), (grads.detach(),), (other,)
    )[1]
    torch.testing.assert_close((y_dot * cotangent).sum(), (other * bar).sum())


def test_numpy_in_numpy_out():
    grads = np.random.randn(3, 40).astype(np.float32)
    out = multisketch_project(grads, 4)
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, multisketch_project(torch.from_numpy(grads), 4).numpy())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"grads": torch.zeros(3)}, ValueError, "grads must have shape [B, P], got [3]"),
        ({"proj_dim": 0}, ValueError, "proj_dim must lie in [1, 4294967296], got 0"),
        ({"column_offset": 5}, ValueError, "num_columns must be given with column_offset, got None"),
        ({"num_columns": 2}, ValueError, "num_columns must be at least column_offset + P = 3, got 2"),
        ({"stream": -1}, ValueError, "stream must lie in [0, 4294967295], got -1"),
        ({"scale": None}, TypeError, "scale must be a real number, got NoneType"),
    ),
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"grads": torch.zeros(2, 3), "proj_dim": 4} | change
    with pytest.raises(error) as caught:
        multisketch_project(**arguments)
    assert str(caught.value) == f"multisketch_project: {message}"
