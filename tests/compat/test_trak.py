"""pyattr.compat.trak without TRAK: the matrix, its streams, and gradients in pieces."""

import enum
import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch

from pyattr.compat import trak
from pyattr.compat.trak import Projector
from pyattr.ops import normal_matrix, sign_matrix

MATRICES = {"rademacher": sign_matrix, "normal": normal_matrix}
KINDS = list(MATRICES)


class ProjectionType(str, enum.Enum):  # as TRAK has it
    normal = "normal"
    rademacher = "rademacher"


def pieces(dtype=torch.float32):
    """Small integers, whose sums are exact, in shapes as a network's gradients have them; 131 columns."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv": (4, 3, 3), "norm": (), "bias": (5,), "empty": (0, 7), "linear": (9, 9), "strided": (8,)}
    made = {name: torch.randint(-4, 5, (6, *shape), generator=generator).to(dtype) for name, shape in shapes.items()}
    made["strided"] = made["strided"].T.contiguous().T
    return made


def joined(grads):
    return torch.cat([piece.reshape(6, -1) for piece in grads.values() if piece.numel()], dim=1)


@pytest.mark.parametrize("seed, model_id", [(0, 0), (7, 0), (7, 3), (2**32 - 1, 2**32 - 1), (np.int64(10**8), 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_that_of_seed_and_model_id(kind, seed, model_id):
    out = Projector(200, 9, seed, kind, "cpu").project(torch.eye(200), model_id)
    entries = MATRICES[kind](range(9), range(200), int(seed), model_id)
    np.testing.assert_allclose(out.T, entries, rtol=0, atol=0 if kind == "rademacher" else 2e-6)


def test_literal_signs():
    out = Projector(32, 1, 0, "rademacher", "cpu").project(torch.eye(32), 0)
    assert "".join("+" if sign > 0 else "-" for sign in out[:, 0].tolist()) == "+-+-+-++---+-++++++--+---++--++-"


@pytest.mark.parametrize("columns, parity", [(10_240, 0), (10_241, 1)])
def test_signs_are_unscaled_integers(columns, parity):
    out = Projector(columns, 257, 64, "rademacher", "cpu").project(torch.ones(8, columns, dtype=torch.float16), 0)
    assert out.dtype == torch.float32
    assert (out % 2 == parity).all()
    assert len(out[0].unique()) > 50


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_dict_is_the_flat_gradient(dtype):
    grads = pieces(dtype)
    projector = Projector(131, 33, 5, "rademacher")
    assert torch.equal(projector.project(grads, 2), projector.project(joined(grads), 2))
    turned = dict(reversed(grads.items()))
    assert torch.equal(projector.project(turned, 2), projector.project(joined(turned), 2))
    assert not torch.equal(projector.project(turned, 2), projector.project(grads, 2))


def test_a_dict_of_normals_to_rounding():
    grads = pieces()
    projector = Projector(131, 33, 5, "normal")
    torch.testing.assert_close(projector.project(grads, 2), projector.project(joined(grads), 2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_other_seeds_and_checkpoints_are_independent(kind):
    identity = torch.eye(256)
    entries = [
        Projector(256, 256, seed, kind).project(identity, model_id).flatten()
        for seed, model_id in [(0, 0), (0, 1), (1, 0)]
    ]
    correlations = torch.corrcoef(torch.stack(entries)) - torch.eye(3)
    assert correlations.abs().max() < 5 / 256  # five standard errors of 256^2 pairs


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_products_are_kept(kind):
    """E <y, y'> = D <g, g'>, with variance about D (|g|^2 |g'|^2 + <g, g'>^2)."""
    g = torch.randn(6, 900)
    y = Projector(900, 4096, 1, kind).project(g, 0)
    error = y @ y.T / 4096 - g @ g.T
    norms = g.norm(dim=1)
    assert (error.abs() < 5 * (2 / 4096) ** 0.5 * norms[:, None] * norms).all()


@pytest.mark.parametrize("shape", [(8, 10_000), (16, 10_001), (9, 10_002), (45, 1049)])
@pytest.mark.parametrize("proj_dim", [1024, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_orthogonal_gradients_stay_so(shape, proj_dim, dtype):
    """The product of two projections has standard deviation about sqrt(D) |g| |g'|."""
    g = torch.randn(shape)
    g[-1] -= g[0] @ g[-1] / g[0].square().sum() * g[0]
    y = Projector(shape[1], proj_dim, 10**8, "rademacher").project(g.to(dtype), 0)
    assert abs(y[0] @ y[-1]) < 5 * proj_dim**0.5 * g[0].norm() * g[-1].norm()
    torch.testing.assert_close(y.norm(dim=1), proj_dim**0.5 * g.norm(dim=1), rtol=5 / (2 * proj_dim) ** 0.5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_dependence_on_the_batch(kind):
    g = torch.randn(45, 300)
    projector = Projector(300, 65, 3, kind)
    whole = projector.project(g, 1)
    assert torch.equal(whole, torch.cat([projector.project(part, 1) for part in g.split([1, 8, 36])]))
    projector.free_memory()
    assert torch.equal(projector.project(g, 1), whole)


def test_no_autograd_history_and_the_input_stays():
    g = torch.ones(2, 5, requires_grad=True)
    out = Projector(5, 4).project(g, 0)
    assert not out.requires_grad
    out /= 2.0  # as TRAKer does
    assert g.tolist() == torch.ones(2, 5).tolist()


@pytest.mark.parametrize("kind", [*KINDS, *ProjectionType])
def test_the_kind_is_a_string_that_json_holds(kind):
    projector = Projector(5, 4, 0, kind, torch.device("cpu"), dtype=torch.float16, block_size=100, max_batch_size=32)
    assert type(projector.proj_type) is str
    assert json.loads(json.dumps(projector.proj_type)) == ProjectionType(kind).value
    assert (projector.grad_dim, projector.proj_dim, projector.seed) == (5, 4, 0)


@pytest.mark.parametrize("more", [(8,), (100, torch.float32, 0), (100, torch.float32, 0, "further")])
def test_what_their_constructors_take_by_position(more):
    """CudaProjector(..., max_batch_size), BasicProjector(..., block_size, dtype, model_id, *args)."""
    g = torch.randn(3, 5)
    assert torch.equal(
        Projector(5, 4, 1, "normal", "cpu", *more).project(g, 2), Projector(5, 4, 1, "normal").project(g, 2)
    )


def test_what_their_constructors_take_by_name():
    names = {"dtype": torch.float16, "block_size": 100, "max_batch_size": 8, "model_id": 3}
    g = torch.randn(3, 5)
    projector = Projector(grad_dim=5, proj_dim=4, seed=1, proj_type=trak.ProjectionType.normal, device="cpu", **names)
    assert torch.equal(projector.project(g, model_id=2), Projector(5, 4, 1, "normal").project(g, 2))
    with pytest.raises(TypeError, match="unexpected keyword argument 'sede'"):
        Projector(5, 4, sede=1)


def test_another_package_named_trak_is_none_of_theirs(monkeypatch):
    monkeypatch.setitem(sys.modules, "trak", types.ModuleType("trak"))
    monkeypatch.delitem(sys.modules, "pyattr.compat.trak")
    assert importlib.import_module("pyattr.compat.trak").Projector(5, 4).project(torch.ones(2, 5), 0).shape == (2, 4)


@pytest.mark.parametrize("order", [("wide", "half"), ("half", "wide")])
def test_a_float64_piece_makes_a_float64_result(order):
    grads = {"wide": torch.randn(2, 3, dtype=torch.float64), "half": torch.randn(2, 2).half()}
    grads = {name: grads[name] for name in order}
    out = Projector(5, 4).project(grads, 0)
    signs = sign_matrix(range(4), range(5), 0).double()
    torch.testing.assert_close(out, torch.cat([piece.double() for piece in grads.values()], 1) @ signs.T)


def test_empty_gradients():
    assert Projector(0, 4).project(torch.empty(3, 0), 0).tolist() == torch.zeros(3, 4).tolist()
    assert Projector(5, 4).project(torch.empty(0, 5), 0).shape == (0, 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"grad_dim": -1}, ValueError, r"Projector: grad_dim must lie in \[0, 549755813888\], got -1"),
        ({"proj_dim": 0}, ValueError, r"Projector: proj_dim must lie in \[1, 4294967296\], got 0"),
        ({"seed": 2**32}, ValueError, r"Projector: seed must lie in \[0, 4294967295\], got 4294967296"),
        ({"seed": 0.5}, TypeError, "Projector: seed must be an integer, got float"),
        (
            {"proj_type": "sparse"},
            ValueError,
            r"Projector: proj_type must be one of \['normal', 'rademacher'\], got 'sparse'",
        ),
        (
            {"proj_type": ["normal"]},
            ValueError,
            r"Projector: proj_type must be one of \['normal', 'rademacher'\], got \['normal'\]",
        ),
    ],
)
def test_errors_of_the_constructor(change, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        Projector(**{"grad_dim": 5, "proj_dim": 4, "seed": 0, "proj_type": "rademacher", "device": "cpu", **change})


@pytest.mark.parametrize(
    "grads, error, message",
    [
        (torch.ones(2, 6), ValueError, "grads must have grad_dim = 5 columns, got 6"),
        ({"a": torch.ones(2, 3)}, ValueError, "grads must have grad_dim = 5 columns, got 3"),
        ({}, ValueError, "grads must hold at least one tensor, got an empty dict"),
        (
            {"a": torch.ones(2, 3), "b": torch.ones(3, 2)},
            ValueError,
            r"grads must agree in their first dimension, got \[2, 3\]",
        ),
        (torch.ones(()), ValueError, "grads must have a batch dimension, got a scalar for grads"),
        (torch.eye(5).to_sparse(), TypeError, r"grads must be dense \(strided\) tensors, got another layout for grads"),
        ({"a": [1.0]}, TypeError, "grads must be a tensor or a dict of tensors, got list for a"),
    ],
)
def test_errors_of_project(grads, error, message):
    with pytest.raises(error, match=f"^Projector.project: {message}$"):
        Projector(5, 4).project(grads, 0)


def test_model_id_must_fit_the_key():
    with pytest.raises(ValueError, match=r"^Projector.project: model_id must lie in \[0, 4294967295\], got -1$"):
        Projector(5, 4).project(torch.ones(1, 5), -1)
