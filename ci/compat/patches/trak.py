"""A TRAKer that is given no projector makes one of ours on the CPU, where it would make a BasicProjector."""

import numpy as np
import pytest
import torch
import trak.traker

from pyattr.compat.trak import Projector

trak.traker.BasicProjector = Projector


@pytest.fixture(autouse=True)
def seeded():
    """Their inputs are random; a run is to be repeatable."""
    torch.manual_seed(0)
    np.random.seed(0)
