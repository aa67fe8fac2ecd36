"""The statistics of the class experiment."""

import re

import numpy as np
import pytest

from pyattr.evaluation import class_ablation, share


def test_a_case_worked_by_hand():
    distances = [[5.0, 1.0, 2.0], [3.0, 2.0, 1.0], [0.0, 1.0, 1.0], [1.0, 2.0, 9.0]]
    classes = [0, 1, 1, 2]
    after = [[2, 0, 0], [1, 0, 9], [1, 1, 1], [2, 2, 0]]
    found = class_ablation(distances, classes, after)
    # Most influential: 0, 0, 1 (the first of two), 2.
    assert (found.recovered.count, found.recovered.of, found.recovered.value) == (3, 4, 0.75)
    np.testing.assert_array_equal(found.confusion, [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert (found.own_flips.count, found.own_flips.of) == (3, 4)
    assert (found.other_flips.count, found.other_flips.of) == (
        1,
        8,
    )  # to the class 9, which is no class of the ablations
    np.testing.assert_array_equal(found.own_distances, [5, 2, 1, 9])
    np.testing.assert_array_equal(found.other_distances, [1, 2, 3, 1, 0, 1, 1, 2])
    assert found.distances.counts == (4, 8)
    # 5 and 9 are larger than all eight, 2 than five and equal to two, 1 than one and equal to four.
    assert found.distances.effect == (8 + 8 + 6 + 3) / 32
    # Less the medians of the others, 1.5, 2, 0.5 and 1.5: 3.5, 0, 0.5 and 7.5, three of them larger and none smaller.
    assert (found.paired.statistic, found.paired.count, found.paired.effect) == (6.0, 4, 3.5 / 4)
    assert found.paired.p_value == pytest.approx(2 / 8)


def test_wilsons_interval():
    found = share([True] * 8 + [False] * 2)
    # Newcombe 1998: centre (p + z^2 / 2n) / (1 + z^2 / n) and so on, with z = 1.959964.
    assert (round(found.low, 4), round(found.high, 4)) == (0.4902, 0.9433)
    nothing = share([])
    assert nothing.of == 0 and np.isnan([nothing.value, nothing.low, nothing.high]).all()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            (np.zeros((3, 1)), [0] * 3, np.zeros((3, 1), int)),
            "class_ablation: distances must have shape [Q, C] with at least one sample and two classes, got [3, 1]",
        ),
        (
            (np.zeros((3, 2)), [0] * 3, np.zeros((3, 3), int)),
            "class_ablation: classes must have shape [3] and ablated_classes [3, 2], got [3] and [3, 3]",
        ),
        (
            (np.zeros((2, 2)), [0, 2], np.zeros((2, 2), int)),
            "class_ablation: classes must lie in [0, 2), got 0..2",
        ),
        (([[0.0, np.nan]], [0], [[0, 0]]), "class_ablation: distances must not be NaN"),
        (([[0.0, 1.0]], [0.5], [[0, 0]]), "class_ablation: classes must be integers, got torch.float64"),
        (([[0.0, 1.0]], [0], [[True, False]]), "class_ablation: ablated_classes must be integers, got torch.bool"),
        (([["0", "1"]], [0], [[0, 0]]), "class_ablation: distances has dtype <U1, which torch does not have"),
    ],
)
def test_refusals(arguments, told):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(told)}$"):
        class_ablation(*arguments)


def test_a_share_is_of_booleans():
    with pytest.raises(TypeError, match=r"^share: happened must be booleans, got torch.float64$"):
        share([0.0, np.nan])  # of which NaN would count as True
