"""Figures of encoded ensembles, on images of a few pixels."""

import numpy as np
import pytest
import torch
from torch import nn

from pyattr.attribution.encoded_samples import METHODS
from pyattr.evaluation import Convergence, Distance, Extractor, l2
from pyattr.evaluation.encoded import (
    GUESSES,
    class_results,
    convergence_summary,
    guess_results,
    quality,
    random_items,
)


def images(*pixels):
    """[..., 1, 1, 2] from pairs of pixels."""
    return torch.tensor(pixels)[..., None, None, :]


def bright(x):
    """1 for images whose first pixel is positive."""
    return (x[:, 0, 0, 0] > 0).long().numpy()


def test_classes_by_hand():
    samples = images([-1.0, 0.0], [1.0, 0.0])
    without = images(
        [[1.0, 0.0], [-1.0, 0.4]],  # a dark one: without the dark ones it is bright
        [[1.0, 0.6], [0.6, 0.0]],  # a bright one: moved more by the dark ones, and stays what it is
    )
    found = class_results(samples, without, bright, [l2])
    np.testing.assert_array_equal(found.classes, [0, 1])
    np.testing.assert_allclose(found.distances["L2"], [[1, 0.2], [0.3, 0.2]], rtol=1e-6)
    told = found.summary()
    assert told["samples"] == 2 and list(told["samples by predicted class"]) == [1, 1]
    own, another = told["own ablation flips the class"], told["another ablation flips the class"]
    assert (own.count, own.of, another.count, another.of) == (1, 2, 0, 2)
    by = told["by distance"]["L2"]
    assert by["most influential ablation is of the sample's class"].count == 1
    assert by["confusion"].tolist() == [[1, 0], [1, 0]]
    # Four distances, but two samples: 1 against 0.2 and 0.2 against 0.3.
    paired = by["own against another, paired by sample"]
    assert (paired.count, paired.effect) == (2, 0.5) and paired.difference == pytest.approx(0.35)
    assert by["median of own ablation"] == pytest.approx(0.6) and by["median of another"] == pytest.approx(0.25)


def test_measures_stand_beside_each_other():
    samples, without = images([-1.0, 0.0], [1.0, 0.0]), torch.zeros(2, 3, 1, 1, 2)
    extractor = Extractor("pixel", nn.Flatten())
    found = class_results(samples, without, bright, [l2, lambda a, b: l2(-a, -b).__class__("other", l2(a, b).values)])
    assert list(found.summary()["by distance"]) == ["L2", "other"]
    assert quality(samples, without, samples, extractor).summary().keys() == {"Fréchet distance of pixel features"}


def test_guesses_by_hand():
    samples = torch.zeros(2, 1, 1, 3)
    changes = torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.4, 0.4], [0.6, 0.6, 0.0]])
    true = changes.expand(2, 3, 3)[:, :, None, None]  # [Q, M, C, H, W]
    found = guess_results(samples, true, {"right": 0.5 * true, "wrong": -true, "nothing": 0 * true}).summary()
    assert found["size of the true changes, L2"]["median"] == pytest.approx(0.2**0.5 / 5**0.5 * 2**0.5)
    assert found["size of the true changes, L2"]["largest"] == pytest.approx(0.3 * 2**0.5)
    right, wrong, nothing = found["agreement"].values()
    assert right["median Pearson"] == pytest.approx(1) and right["median Spearman"] == pytest.approx(1)
    assert wrong["median Pearson"] == pytest.approx(-1) and wrong["median Spearman"] == pytest.approx(1)
    np.testing.assert_allclose(wrong["Pearson quartiles"], [-1, -1])
    # A guess without any change has no correlation, and nothing to compare.
    assert np.isnan(nothing["median Pearson"]) and np.isnan(nothing["Spearman quartiles"]).all()
    against = found["right against"]
    assert against["wrong"]["pearson"].effect == 1 and against["wrong"]["pearson"].counts == (6, 6)
    assert against["wrong"]["spearman"].effect == 0.5
    assert against["nothing"] == {"pearson": None, "spearman": None}
    # Six correlations, but two samples.
    paired = found["right against, paired by sample"]
    assert (paired["wrong"]["pearson"].count, paired["wrong"]["pearson"].effect) == (2, 1)
    assert paired["wrong"]["pearson"].difference == pytest.approx(2) and paired["wrong"]["spearman"].effect == 0.5
    assert paired["nothing"] == against["nothing"]


def test_quality_by_hand():
    real = images([-0.5, 0.0], [0.5, 0.0])
    alone = torch.stack([real, real + 0.25], 1)  # [Q, n, C, H, W]
    found = quality(real, alone, real, Extractor("pixel", nn.Flatten()))
    assert found.ensemble == Distance("Fréchet distance of pixel features", pytest.approx(0, abs=1e-12))
    # Two means apart by a quarter in both pixels.
    assert [each.value for each in found.members] == pytest.approx([0, 2 / 16], abs=1e-6)


def test_the_training_images_go_through_the_network_once():
    real, asked = images(*([value, 0.0] for value in (-0.5, -0.1, 0.1, 0.5))), []
    samples = real[:2]
    module = nn.Flatten()
    module.register_forward_hook(lambda _module, given, _features: asked.append(len(given[0])))
    quality(samples, torch.stack([samples] * 5, 1), real, Extractor("pixel", module))
    assert sorted(asked) == [2] * 6 + [4]


def test_how_samples_settle():
    settling = Convergence(np.array([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0]]), np.array([[2.0, 1.0], [4.0, 1.0]]))
    found = convergence_summary(settling)
    assert found["members"] == [1, 2, 3]
    assert found["to the full ensemble"].tolist() == [2, 1, 0] and found["to the next"].tolist() == [3, 1]


def test_items_are_drawn_without_return():
    np.testing.assert_array_equal(random_items(6, 3), [1, 2, 5])
    np.testing.assert_array_equal(random_items(6, 6, seed=3), range(6))
    assert random_items(1000, 10, seed=1).tolist() != random_items(1000, 10).tolist()


def test_every_way_of_guessing_has_a_name():
    assert tuple(GUESSES) == METHODS
