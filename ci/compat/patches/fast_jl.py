"""Ours under their name, and a CudaProjector that does not ask for a card."""

import sys

import numpy as np
import pytest
import torch
from trak.projectors import AbstractProjector, CudaProjector

import pyattr.compat.fast_jl

sys.modules["fast_jl"] = pyattr.compat.fast_jl


def init(self, grad_dim, proj_dim, seed, proj_type, device, max_batch_size, *args, **kwargs):
    AbstractProjector.__init__(self, grad_dim, proj_dim, seed, proj_type, device)
    self.max_batch_size = max_batch_size
    self.num_sms = 108


CudaProjector.__init__ = init


@pytest.fixture(autouse=True)
def seeded():
    """Their inputs are random; a run is to be repeatable."""
    torch.manual_seed(0)
    np.random.seed(0)
