"""Our matrices are those of bergson 2.5.1 under its key: literals taken from bergson itself, which is not needed here."""

import numpy as np
import pytest
import torch

from bench.worker import bergson_key
from pyattr import testing
from pyattr.ops import gaussian_project, rademacher_project, sign_matrix
from pyattr.ops.gaussian_project import normal_matrix

IDENTIFIER = "unet.mid_block/single/seed7"
# bergson's random_matrix(IDENTIFIER, 3, 300, "cpu", "rademacher"): columns 0 to 63 and 236 to 299.
SIGNS = [
    "--+++-+----++----+++--+--+--+++++--++-+++----+-++--++--+++-++-++++-+----++-+----++++-++-++--++-+----+++-++--+++++++-+-+++---++--",
    "+---++-+-+--+++-++---+++---+-++++--++--+++++-+---+++-+-+++--+-+--++-+---+++----+-+-+++++-------+--+---+----++-++-++-++-+-++--+-+",
    "--+++++--+-+++--+--++++--------+-+--+-++---+-+-+-++++-+-+--+-+-+--+--++--+-++-++++---+-++++-++++++++++++--++++++----+-+---+-+---",
]
# bergson's random_matrix(IDENTIFIER, 2, 9, "cpu", "normal").
NORMALS = [
    [0.20784030854701996, -0.2583840489387512, 1.6169939041137695, 0.4074709117412567, 1.2265948057174683,
     -1.5837500095367432, 1.5670650005340576, -0.6182037591934204, 0.3853346109390259],
    [-0.20204773545265198, 0.38524308800697327, 0.8177889585494995, 0.550972580909729, -1.4371750354766846,
     0.6255778670310974, -0.15909934043884277, -0.24380676448345184, 0.312936931848526],
]  # fmt: skip
# 4 * bergson's project_global(IDENTIFIER, x, 16, "rademacher"): it divides by sqrt(16), these are the sums. In one block,
# and in blocks of 128 columns, each a matrix of its own.
ONE_BLOCK = [
    [-55, -17, -65, 65, 79, -57, -23, 91, -1, 39, -53, -5, -39, -27, -113, 33],
    [-6, 112, 132, 30, 72, 84, -88, -92, -64, -16, -66, -16, -8, -36, 48, -14],
]
THREE_BLOCKS = [
    [-39, -39, -7, 17, 3, -11, -53, 71, 25, 61, -17, 29, 21, -65, 41, 9],
    [22, 112, 180, -36, 56, 60, -62, -76, 60, -94, -14, -52, -22, -4, -52, 20],
]


@pytest.fixture
def x():
    i = np.arange(300)
    return torch.tensor(np.stack([i * 7 % 11 - 5, i * 5 % 13 - 6]), dtype=torch.float32)  # [2, 300]


def test_key_is_the_first_eight_bytes_of_the_md5():
    assert bergson_key(IDENTIFIER) == (0x89698BD1, 0xB07A8F22)


def test_signs():
    columns = [*range(64), *range(236, 300)]
    signs = sign_matrix(range(3), columns, *bergson_key(IDENTIFIER))
    assert ["".join("+" if sign > 0 else "-" for sign in row) for row in signs.tolist()] == SIGNS


def test_normals():
    entries = normal_matrix(range(2), range(9), *bergson_key(IDENTIFIER))
    np.testing.assert_allclose(entries.numpy(), NORMALS, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", testing.usable_backends("rademacher_project"))
def test_projection_in_one_block(x, backend):
    seed, stream = bergson_key(f"{IDENTIFIER}/0")
    device = testing.device_of(backend)
    out = rademacher_project(x.to(device), 16, seed=seed, stream=stream, backend=backend)
    assert out.cpu().tolist() == ONE_BLOCK


@pytest.mark.parametrize("backend", testing.usable_backends("rademacher_project"))
def test_projection_in_blocks_starts_a_new_matrix_at_each(x, backend):
    device = testing.device_of(backend)
    total = torch.zeros(2, 16)
    for start in range(0, 300, 128):
        seed, stream = bergson_key(f"{IDENTIFIER}/{start}")
        block = x[:, start : start + 128].to(device)
        total += rademacher_project(block, 16, seed=seed, stream=stream, backend=backend).cpu()
    assert total.tolist() == THREE_BLOCKS


def test_normal_projection_uses_those_entries():
    seed, stream = bergson_key(IDENTIFIER)
    out = gaussian_project(torch.eye(9), 2, seed=seed, stream=stream)
    np.testing.assert_allclose(out.numpy().T, NORMALS, rtol=0, atol=5e-6)
