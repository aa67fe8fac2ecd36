"""The seeded permutation behind the mask and the Hadamard projection: a bijection, pinned, and uniform over the seeds."""

import itertools

import pytest
import torch

from pyattr.reference.permutation import permutation


def whole(n, seed=0, stream=0):
    return permutation(torch.arange(n), n, seed, stream)


@pytest.mark.parametrize("seed", (0, 1, 2**32 - 1))
def test_is_a_bijection_of_every_small_range(seed):
    for n in (*range(seed % 3, 70, 3), 127, 128, 129, 256, 257, 4097):
        assert torch.equal(whole(n, seed, 3).sort().values, torch.arange(n))


def test_the_smallest_ranges():
    assert whole(0).tolist() == [] and whole(1).tolist() == [0]
    found = {tuple(whole(2, seed).tolist()) for seed in range(20)}
    assert found == {(0, 1), (1, 0)}
    assert {tuple(whole(3, seed).tolist()) for seed in range(40)} == set(itertools.permutations(range(3)))


def test_pinned_places():
    """They must never change: stored features depend on them. 24 half-rounds below 8 bits, 6 from there on."""
    assert whole(10).tolist() == PINNED_10
    assert permutation(torch.tensor([0, 1, 999]), 1000, 5, 7).tolist() == PINNED_1000
    assert permutation(torch.tensor([0, 1, 2**62 - 1]), 2**62, 5, 7).tolist() == PINNED_2_TO_62


PINNED_10 = [3, 1, 9, 6, 4, 5, 7, 2, 8, 0]
PINNED_1000 = [688, 574, 379]
PINNED_2_TO_62 = [2606015207400718314, 202712275734121120, 1503192909847894110]


def test_a_place_does_not_depend_on_what_is_asked_beside_it():
    everything = whole(1000, 4, 2)
    assert torch.equal(permutation(torch.tensor([999, 0, 17, 17]), 1000, 4, 2), everything[[999, 0, 17, 17]])


def test_the_largest_range_stays_inside_and_distinct():
    indices = torch.cat([torch.arange(500), torch.arange(2**61, 2**61 + 500)])
    for n in (2**61 + 500, 2**62):
        out = permutation(indices, n, 1, 2)
        assert out.min() >= 0 and out.max() < n and len(out.unique()) == 1000


@pytest.mark.parametrize("n", (2, 4, 8, 32, 64, 128))
def test_pairs_of_places_are_uniform_over_seeds(n):
    """Chi-square of the n (n - 1) outcomes of a pair of indices: within five standard deviations, sqrt(2 df), of its mean df.

    Frequencies that were off by a share e (root mean square) would add draws * e^2 to it: the 27% that six half-rounds leave at
    n = 8 would add 1,500 where 5 deviations are 52. Ranges that are no power of two walk through these very ones.
    """
    draws = 20_000
    seeds = torch.arange(draws)[:, None]  # one call makes every seed's pair
    for i, j in {(0, 1), (0, n - 1), (n // 2 - 1, n // 2)}:
        pairs = permutation(torch.tensor([[i, j]]).expand(draws, 2), n, seeds, 3)
        assert pairs[17].tolist() == permutation(torch.tensor([i, j]), n, 17, 3).tolist()
        counts = torch.bincount(pairs[:, 0] * n + pairs[:, 1], minlength=n * n).view(n, n).double()
        assert counts.diagonal().sum() == 0
        expected, freedom = draws / (n * (n - 1)), n * (n - 1) - 1
        off = counts[~torch.eye(n, dtype=torch.bool)]
        chi_square = (off - expected).square().sum() / expected
        assert abs(chi_square - freedom) <= 5 * (2 * freedom) ** 0.5


def test_seed_and_stream_give_independent_permutations():
    """Two random permutations of 4,096 agree in one place on average (Poisson); ten would be one chance in ten million."""
    made = [whole(4096, seed, stream) for seed, stream in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for a, b in itertools.combinations([torch.arange(4096), *made], 2):
        assert (a == b).sum() < 10
