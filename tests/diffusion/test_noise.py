import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr.diffusion import noise
from pyattr.diffusion.noise import FEATURES, SAMPLES
from pyattr.ops import normal_matrix


def draw(**arguments):
    return noise((2, 3), **{"seed": 1, "ids": 5, "timesteps": 7, **arguments})


def test_id_zero_is_the_normal_matrix_of_the_projections_contract():
    for count in (1, 3, 4, 5, 70_001):  # the last spans several internal blocks
        ours = noise((count,), seed=3, ids=0, timesteps=torch.tensor([0, 7, 999]))
        matrix = normal_matrix([0, 7, 999], range(count), 3, FEATURES)
        torch.testing.assert_close(ours.double(), matrix, atol=3e-7, rtol=1e-6)


def test_pinned_values():
    values = noise((1, 2, 2), seed=42, ids=(1 << 40) + 3, timesteps=500, draws=2, purpose=SAMPLES)
    expected = torch.tensor([[[0.83474773, 0.21703807], [-0.13667405, 0.77312380]]])
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_numbers_of_one_draw_match_box_and_muller_by_hand():
    from pyattr.reference.philox import philox4x32_10

    x = [int(w) for w in philox4x32_10((0, 7 + 2 * (1 << 20), 9, 4), (11, FEATURES))]
    values = noise((4,), seed=11, ids=(4 << 32) + 9, timesteps=7, draws=2)
    radius = [math.sqrt(-2 * math.log((x[i] + 0.5) / 2**32)) for i in (0, 2)]
    angle = [2 * math.pi * x[i] / 2**32 for i in (1, 3)]
    by_hand = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (math.cos, math.sin)]
    torch.testing.assert_close(values, torch.tensor(by_hand), atol=1e-6, rtol=1e-6)


@given(
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9, unique=True),
    st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True),
    st.randoms(use_true_random=False),
)
def test_each_entry_is_its_own_whatever_it_is_drawn_with(ids, timesteps, random):
    whole = noise((1, 3, 5), seed=9, ids=torch.tensor(ids)[:, None], timesteps=torch.tensor(timesteps))
    assert whole.shape == (len(ids), len(timesteps), 1, 3, 5)
    order = random.sample(range(len(ids)), len(ids))
    for i in order:
        for j in range(len(timesteps)):
            alone = noise((1, 3, 5), seed=9, ids=ids[i], timesteps=timesteps[j])
            assert torch.equal(alone, whole[i, j])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"ids": 6},
        {"ids": 5 + (1 << 32)},
        {"timesteps": 8},
        {"draws": 1},
        {"purpose": SAMPLES},
    ],
)
def test_every_argument_gives_other_noise(other):
    assert not torch.isclose(draw(), draw(**other)).any()


def test_thread_count_changes_nothing():
    torch.set_num_threads(1)
    one = noise((3, 32, 32), seed=0, ids=torch.arange(20), timesteps=1)
    torch.set_num_threads(2)
    assert torch.equal(one, noise((3, 32, 32), seed=0, ids=torch.arange(20), timesteps=1))


def test_moments_and_independence():
    values = noise((32, 32), seed=0, ids=torch.arange(100)[:, None], timesteps=torch.arange(10)).double()
    flat = values.flatten(0, 1).flatten(1)  # [1000, 1024]
    count = flat.numel()
    assert abs(float(flat.mean())) < 4 / count**0.5
    assert abs(float(flat.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((flat**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    rows = flat @ flat.T / flat.shape[1]  # correlations between (id, timestep) pairs
    assert float((rows - torch.eye(len(rows))).abs().max()) < 6 / flat.shape[1] ** 0.5


def test_empty():
    assert noise((3,), seed=0, ids=torch.empty(0, dtype=torch.int64), timesteps=0).shape == (0, 3)
    assert noise((0,), seed=0, ids=1, timesteps=0).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 1 << 32}, "seed must lie in"),
        ({"ids": -1}, "ids must lie in"),
        ({"timesteps": 1 << 20}, "timesteps must lie in"),
        ({"draws": 1 << 12}, "draws must lie in"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)
