"""pyattr.compat.fast_jl without fast_jl: every function, on any device, width and batch."""

import numpy as np
import pytest
import torch

from pyattr.compat import fast_jl
from pyattr.ops import normal_matrix, sign_matrix

NAMES = [f"project_{kind}_{size}" for kind in ("rademacher", "normal") for size in (8, 16, 32)]
# Row 0 of the sign matrix of seed 0.
FIRST_SIGNS = "+-+-+-++---+-++++++--+---++--++-"


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_dtype_for_any_batch_and_width(name):
    project = getattr(fast_jl, name)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = project(torch.ones(13, 37, dtype=dtype), 7, 3, 108)
        assert (out.shape, out.dtype) == ((13, 7), torch.float32)
    assert project(torch.ones(0, 37), 7, 3, 108).shape == (0, 7)


@pytest.mark.parametrize("name", NAMES)
def test_the_suffix_and_the_tiles_are_not_part_of_the_matrix(name):
    x = torch.randn(5, 300)
    kind = name.rsplit("_", 1)[0]
    expected = getattr(fast_jl, f"{kind}_8")(x, 40, 9, 108)
    for tiles in (1, 132, 10**6):
        assert torch.equal(getattr(fast_jl, name)(x, 40, 9, tiles), expected)


@pytest.mark.parametrize("features, parity", [(10_240, 0), (10_241, 1)])
def test_signs_are_unscaled_integers(features, parity):
    out = fast_jl.project_rademacher_8(torch.ones(8, features, dtype=torch.float16), 512, 78, 108)
    assert (out % 2 == parity).all()
    assert len(out[0].unique()) > 50


def test_literal_signs():
    first = fast_jl.project_rademacher_16(torch.eye(32), 1, 0, 1)[:, 0]
    assert "".join("+" if sign > 0 else "-" for sign in first.tolist()) == FIRST_SIGNS


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, np.int64(123)])
def test_the_matrix_is_that_of_the_seed(seed):
    identity = torch.eye(200)
    signs = fast_jl.project_rademacher_32(identity, 9, seed, 108)
    assert torch.equal(signs.T, sign_matrix(range(9), range(200), int(seed)))
    normals = fast_jl.project_normal_32(identity, 9, seed, 108)
    np.testing.assert_allclose(normals.T, normal_matrix(range(9), range(200), int(seed)), atol=2e-6)


def test_float32_is_not_rounded_to_float16():
    large = torch.tensor([[1e30, 1e-30]])
    assert fast_jl.project_rademacher_8(large, 4, 0, 108).abs().tolist() == [[float(np.float32(1e30))] * 4]
    assert fast_jl.project_rademacher_8(large[:, 1:], 4, 0, 108).abs().tolist() == [[float(np.float32(1e-30))] * 4]


def test_no_autograd_history():
    """A caller may go on with ``.numpy()``, and nothing of the gradient stays behind the features."""
    for project in (fast_jl.project_rademacher_8, fast_jl.project_normal_8):
        assert not project(torch.ones(2, 3, requires_grad=True), 4, 0, 108).requires_grad


def test_strided_input():
    x = torch.randn(300, 6)
    for project in (fast_jl.project_rademacher_8, fast_jl.project_normal_8):
        assert torch.equal(project(x.T, 20, 1, 108), project(x.T.contiguous(), 20, 1, 108))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([[1.0]], 1, 0, 1), TypeError, "fast_jl: input must be a torch tensor, got list"),
        ((torch.ones(3), 1, 0, 1), ValueError, r"fast_jl: input must have shape \[B, F\], got \[3\]"),
        ((torch.ones(1, 1), 0, 0, 1), ValueError, r"fast_jl: N must lie in \[1, 4294967296\], got 0"),
        ((torch.ones(1, 1), 1, -1, 1), ValueError, r"fast_jl: seed must lie in \[0, 4294967295\], got -1"),
        ((torch.ones(1, 1), 1, 0, 0), ValueError, "fast_jl: num_feature_tiles must lie in .*, got 0"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        fast_jl.project_normal_8(*arguments)
