"""TRAK's CudaProjector on our functions, on a machine without a GPU as far as its own code goes."""

import sys

import pytest
import torch
from trak.projectors import AbstractProjector, CudaProjector, ProjectionType

import pyattr.compat.fast_jl
from pyattr.ops import sign_matrix


class WithoutCard(CudaProjector):
    """CudaProjector but for its constructor, which asks for a card and how many multiprocessors it has."""

    def __init__(self, seed, proj_type, num_sms):
        AbstractProjector.__init__(self, 70, 24, seed, proj_type, "cpu")
        self.max_batch_size, self.num_sms = 32, num_sms


@pytest.fixture(autouse=True)
def alias(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_jl", pyattr.compat.fast_jl)


def gradients(batch):
    generator = torch.Generator().manual_seed(batch)
    return {
        "weight": torch.randn(batch, 6, 10, generator=generator),
        "bias": torch.randn(batch, 10, generator=generator),
    }


@pytest.mark.parametrize("batch", [3, 8, 9, 16, 17, 40])
def test_cuda_projector(batch):
    g = gradients(batch)
    out = WithoutCard(5, ProjectionType.rademacher, 108).project(g, model_id=2)
    signs = sign_matrix(range(24), range(70), 5 + 2 * 10**4)  # the seed is TRAK's
    flat = torch.cat([g["weight"].flatten(1), g["bias"]], dim=1)
    torch.testing.assert_close(out, flat @ signs.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("proj_type", list(ProjectionType))
def test_the_number_of_multiprocessors_changes_nothing(proj_type):
    small, large = (WithoutCard(5, proj_type, sms).project(gradients(16), model_id=0) for sms in (7, 132))
    assert torch.equal(small, large)


def test_usage_example(run_example):
    features = run_example(pyattr.compat.fast_jl)["features"]
    assert features.shape == (8, 512)
    assert features.abs().max() > 0
