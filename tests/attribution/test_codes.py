import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr.attribution import codes
from pyattr.attribution.codes import (
    ablation_weights,
    as_codes,
    bias_bound,
    collision_bound,
    group_codes,
    guarantee,
    membership,
    random_codes,
    walsh_codes,
)


@given(st.data())
def test_random_codes_are_distinct_and_of_one_weight(data):
    members = data.draw(st.integers(2, 64))
    weight = data.draw(st.integers(1, members - 1))
    total = math.comb(members, weight)
    items = data.draw(st.integers(0, min(total, 300)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    found = random_codes(items, members, weight=weight, seed=seed)
    assert found.dtype == np.uint64 and found.shape == (items,)
    assert len(set(found.tolist())) == items
    assert {code.bit_count() for code in found.tolist()} <= {weight}
    assert items == 0 or int(found.max()) < 2**members
    np.testing.assert_array_equal(found, random_codes(items, members, weight=weight, seed=seed))


def test_all_codes_of_a_weight_in_random_order():
    found = random_codes(6, 4, seed=3).tolist()
    assert sorted(found) == [0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100]
    orders = {tuple(random_codes(6, 4, seed=seed).tolist()) for seed in range(40)}
    assert len(orders) > 30  # of 720


@pytest.mark.parametrize("items", [3, 5])  # by drawing, and from a random order of all
def test_each_code_is_as_likely_at_each_place(items):
    trials = 1200
    counts = np.zeros((items, 16))
    for seed in range(trials):
        counts[np.arange(items), random_codes(items, 4, seed=seed).astype(int)] += 1
    assert (counts.sum(0) > 0).sum() == 6
    expected, found = trials / 6, counts[:, counts.sum(0) > 0]
    # A chi-square of 5 degrees of freedom exceeds 30 once in 70,000 times.
    assert (((found - expected) ** 2 / expected).sum(1) < 30).all()


def test_fewer_items_have_the_first_codes():
    many = random_codes(5000, 40, seed=7)
    np.testing.assert_array_equal(random_codes(20, 40, seed=7), many[:20])
    assert not np.array_equal(random_codes(20, 40, seed=8), many[:20])


def test_the_codes_of_a_seed_are_these():
    """They lie in the directories of trained ensembles, and must be the same from one version to the next."""
    assert random_codes(4, 16, seed=0).tolist() == [3539, 60451, 36621, 43070]
    assert random_codes(4, 16, seed=1).tolist() == [26424, 10489, 36442, 51727]
    assert random_codes(3, 64, seed=7).tolist() == [13899520930588887667, 1846726178097130323, 14095563811468461955]
    assert random_codes(3, 24, weight=5, seed=2**32 - 1).tolist() == [4358912, 17546, 92192]
    assert random_codes(5, 4, seed=3).tolist() == [6, 10, 9, 3, 12]  # from a random order of all six
    assert group_codes([30, 10, 20, 10], 8, seed=5).tolist() == [57, 154, 195, 154]
    assert walsh_codes([0, 1, 2, 3, 4, 6, 8]).tolist() == [42, 25, 76, 7, 82, 97, 52]
    assert walsh_codes([2, 0, 1], 3).tolist() == [4, 2, 1]


def test_blocks_do_not_change_the_codes(monkeypatch):
    expected = random_codes(500, 20, seed=1), random_codes(60, 8, seed=1)
    monkeypatch.setattr(codes, "_BLOCK", 7)
    for before, items, members in zip(expected, (500, 60), (20, 8), strict=True):
        np.testing.assert_array_equal(random_codes(items, members, seed=1), before)


def test_as_many_codes_as_there_are():
    found = random_codes(12870, 16)
    assert len(np.unique(found)) == 12870


def test_bits_of_random_codes_are_even():
    bits = membership(random_codes(20000, 24, seed=5), 24)
    assert abs(bits.mean(0) - 0.5).max() < 0.02  # 5.6 standard deviations


WALSH = {0: "0101010", 1: "1001100", 2: "0011001", 3: "1110000", 4: "0100101", 6: "1000011", 8: "0010110"}


def test_walsh_codes_are_the_published_ones():
    labels = np.array([8, 0, 3, 1, 1, 6, 2, 4])
    found = membership(walsh_codes(labels), 7)
    assert ["".join("01"[bit] for bit in row) for row in found.astype(int)] == [WALSH[label] for label in labels]


@pytest.mark.parametrize("members", [3, 7, 15, 31, 63])
def test_any_two_walsh_codes_share_as_many_members(members):
    bits = membership(walsh_codes(torch.arange(members), members), members).astype(int)
    shared = bits @ bits.T
    assert (np.diag(shared) == (members - 1) // 2).all()
    assert (shared[~np.eye(members, dtype=bool)] == (members - 3) // 4).all()


def test_a_group_shares_a_code():
    found = group_codes([7, 3, 7, 9, 3], 6, seed=2)
    three, seven, nine = random_codes(3, 6, seed=2)
    assert found.tolist() == [seven, three, seven, nine, three]


def test_membership_and_ablation_weights_by_hand():
    found = membership(np.array([0b011, 0b100], np.uint64), 3)
    assert found.tolist() == [[True, True, False], [False, False, True]]
    assert ablation_weights([0b011, 0b100, 0], 3).tolist() == [[0, 0, 1], [0.5, 0.5, 0], [1 / 3] * 3]
    assert membership(np.array([], np.uint64), 5).shape == (0, 5)


def brute_force(found):
    """Every other item's code has a bit outside of the removed one's."""
    return all(kept & ~removed for removed in set(found) for kept in set(found) if kept != removed)


@given(st.integers(2, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 2**n - 2), max_size=8))))
def test_guarantee_is_what_it_says(case):
    members, found = case
    assert guarantee(found, members) == brute_force(found)


def test_guarantee_by_hand(monkeypatch):
    assert guarantee(random_codes(100, 10), 10)
    assert guarantee(walsh_codes(np.arange(7).repeat(3)), 7)
    assert not guarantee([0b0110, 0b0010], 4)
    assert guarantee([0b0110, 0b1001, 0b0101], 4)
    assert guarantee([0b0110, 0b1000], 4)
    assert guarantee([], 4) and guarantee([3], 4) and not guarantee([0, 3], 4)
    monkeypatch.setattr(codes, "_PAIRS", 1)
    assert not guarantee([0b1100, 0b0011, 0b0111], 4)


def test_bounds_of_the_papers_data_sets_say_nothing():
    for items, members, value, applies in (
        (10_000, 16, 21_538.7, False),
        (60_000, 20, 54_022.5, True),
        (202_599, 24, 42_084.7, True),
    ):
        bound = bias_bound(items, members)
        assert bound.value == pytest.approx(value, rel=1e-5) and bound.trivial == 2
        assert bound.applies is applies and bound.vacuous
        assert bias_bound(items, members, sup=3.0).value == pytest.approx(3 * value, rel=1e-5)
        assert collision_bound(items, members).value == pytest.approx(value / 2, rel=1e-5)
        assert bias_bound(items, members, ablated=True).value == pytest.approx(
            value * (items / (items - 1)) ** 2, rel=1e-5
        )


def test_bounds_that_say_something():
    bound = bias_bound(1000, 40)
    assert bound.applies and not bound.vacuous
    assert bound.value == pytest.approx(math.log(16) * 999**2 / math.comb(40, 20))
    assert collision_bound(1000, 40).trivial == 1 and not collision_bound(1000, 40).vacuous
    assert bias_bound(1000, 40, weight=19).vacuous  # not half of the members
    assert collision_bound(1, 40).value == 0


def test_collisions_stay_below_their_bound():
    members, items, trials = 12, 10, 2000
    draws = np.random.default_rng(0).integers(math.comb(members, 6), size=(trials, items))
    rate = np.mean([len(set(row)) < items for row in draws.tolist()])
    assert 0.02 < rate < collision_bound(items, members).value < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_codes(60000, 16), "random_codes: num_items must be at most C(16, 8) = 12870, got 60000"),
        (lambda: random_codes(-1, 16), "random_codes: num_items must lie in [0, 9223372036854775807], got -1"),
        (lambda: random_codes(5, 65), "random_codes: num_members must lie in [2, 64], got 65"),
        (lambda: random_codes(5, 6, weight=6), "random_codes: weight must lie in [1, 5], got 6"),
        (lambda: random_codes(5, 6, seed=-1), "random_codes: seed must lie in [0, 4294967295], got -1"),
        (lambda: walsh_codes([1, 2], 6), "walsh_codes: num_members + 1 must be a power of two, got num_members 6"),
        (
            lambda: walsh_codes(range(8)),
            "walsh_codes: labels must have at most 7 distinct values, one for each row, got 8",
        ),
        (lambda: as_codes([[1]], 4, "op"), "op: codes must have shape [N], got [1, 1]"),
        (lambda: as_codes([1, 16], 4, "op"), "op: codes must have bits below 4 alone, got 0x10 for item 1"),
        (lambda: as_codes([1, 3, 15], 4, "op"), "op: codes must leave at least one member out, got 0xf for item 2"),
        (lambda: as_codes([-1], 4, "op"), "op: codes must not be negative, got -1"),
        (lambda: bias_bound(0, 6), "bias_bound: num_items must lie in [1, 9223372036854775807], got 0"),
        (lambda: bias_bound(5, 6, sup=-1.0), "bias_bound: sup must be a finite number, not negative, got -1.0"),
        (lambda: bias_bound(5, 6, sup=math.nan), "bias_bound: sup must be a finite number, not negative, got nan"),
        (lambda: collision_bound(5, 6, weight=0), "collision_bound: weight must lie in [1, 5], got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_codes_are_integers():
    with pytest.raises(TypeError, match="op: codes must be integers, got float64"):
        as_codes([1.0], 4, "op")


def test_numbers_of_members_and_items_are_integers():
    for call, argument in (
        (lambda: random_codes(5, 6.0), "num_members"),
        (lambda: random_codes(5.0, 6), "num_items"),
        (lambda: bias_bound(5.5, 6), "num_items"),
        (lambda: random_codes(5, 6, weight=3.0), "weight"),
        (lambda: random_codes(5, 6, seed=0.5), "seed"),
        (lambda: bias_bound(5, 6, weight=2.5), "weight"),
        (lambda: as_codes([1], 4.0, "random_codes"), "num_members"),
    ):
        with pytest.raises(TypeError, match=rf"^(random_codes|bias_bound): {argument} must be an integer, got float$"):
            call()


def test_codes_of_any_kind():
    expected = np.array([5, 2**63 + 1], np.uint64)
    for given_codes in (expected, torch.from_numpy(expected), expected.view(np.int64), torch.tensor([5, -(2**63) + 1])):
        found = as_codes(given_codes, 64, "op")
        assert found.dtype == np.uint64
        np.testing.assert_array_equal(found, expected)
