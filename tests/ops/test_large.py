"""Offsets beyond 2^31 elements on the CPU, in a file that is large in name only."""

import numpy as np
import pytest
import torch

from pyattr import ops, testing

pytestmark = pytest.mark.skipif(
    "cpu" not in testing.usable_backends("rademacher_project"), reason="the cpu backend is not built"
)
FAR = 2**31 + 5


@pytest.fixture
def sparse(tmp_path):
    """4.3 GB of float16 in a file that takes up only what is written."""
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * (FAR + 1000))
    if path.stat().st_blocks * 512 > 2**20:
        pytest.skip("this file system has no sparse files")
    yield np.memmap(path, dtype=np.float16, mode="r+")
    path.unlink()


@pytest.mark.parametrize("op", (ops.rademacher_project, ops.gaussian_project))
@pytest.mark.parametrize(("shape", "strides"), (((2, 300), (FAR, 1)), ((3, 2), (1, FAR))))
def test_strides_beyond_2_to_the_31(op, sparse, shape, strides):
    view = np.lib.stride_tricks.as_strided(sparse, shape, [2 * stride for stride in strides])
    view[:] = testing.make_gradients(*shape, torch.float16).numpy()
    assert view[-1, -1] == sparse[(shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1]] != 0
    np.testing.assert_array_equal(op(view, 70, backend="cpu"), op(view.copy(), 70, backend="cpu"))
