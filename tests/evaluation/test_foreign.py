"""Ground truth in the files of other libraries."""

import json

import numpy as np
import pytest
import scipy.stats
import torch

from pyattr.evaluation import lds, read_bergson, read_dattri


@pytest.fixture
def dattri(tmp_path):
    torch.save(torch.tensor([[-1.0, -2], [-3, -5], [-4, -4]]), tmp_path / "target_values_lds.pt")
    torch.save(torch.tensor([[0, 2], [3, 1], [2, 3]]), tmp_path / "indices_lds.pt")
    return tmp_path


@pytest.fixture
def bergson(tmp_path):
    (tmp_path / "subsets.json").write_text(json.dumps([[0, 2], [3], []]))
    (tmp_path / "query_loss_cache").mkdir()
    record = {
        "baseline": 0.0,
        "baseline_per_doc": torch.zeros(2),
        "per_subset": torch.tensor([[1.0, 2], [3, 5], [4, 4]]),
    }
    torch.save(record, tmp_path / "query_loss_cache" / "losses_ab12.pt")
    return tmp_path


def test_dattri(dattri):
    found = read_dattri(dattri, num_images=4)
    np.testing.assert_array_equal(found.masks, [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(found.outputs("loss"), [[1, 2], [3, 5], [4, 4]])
    assert found.images is None and found.queries is None and found.settings == {"source": "dattri"}
    # Its own metric: the sums of scores over the kept images against the values in the file, nothing negated.
    scores = np.random.default_rng(0).standard_normal((2, 4))
    ours = lds(scores, found.masks, found.outputs("loss")).per_query
    for q, values in enumerate(([-1, -3, -4], [-2, -5, -4])):
        sums = [scores[q, kept].sum() for kept in ([0, 2], [3, 1], [2, 3])]
        assert ours[q] == pytest.approx(scipy.stats.spearmanr(sums, values).statistic)
    np.testing.assert_array_equal(read_dattri(dattri, num_images=3).masks.sum(1), [2, 1, 1])


def test_bergson(bergson):
    found = read_bergson(bergson, num_items=4)
    np.testing.assert_array_equal(found.masks, [[0, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(found.outputs("loss"), [[1, 2], [3, 5], [4, 4]])
    other = bergson / "query_loss_cache" / "losses_cd.pt"
    torch.save({"per_subset": torch.tensor([7.0, 8, 9])}, other)  # one query
    with pytest.raises(ValueError, match=r"losses must be chosen, got 2 files: losses_ab12\.pt, losses_cd\.pt"):
        read_bergson(bergson, num_items=4)
    np.testing.assert_array_equal(read_bergson(bergson, num_items=4, losses=other).outputs("loss"), [[7], [8], [9]])


def test_other_content_is_refused(dattri):
    torch.save(torch.tensor([[0, -2], [3, 1], [2, 3]]), dattri / "indices_lds.pt")
    with pytest.raises(ValueError, match="read_dattri: indices must not be negative, got -2"):
        read_dattri(dattri, num_images=4)
    torch.save(torch.tensor([[0, 2]]), dattri / "indices_lds.pt")
    with pytest.raises(ValueError, match="values and indices must be of as many models, got 3 and 1"):
        read_dattri(dattri, num_images=4)
    torch.save(torch.zeros(3), dattri / "target_values_lds.pt")
    with pytest.raises(
        ValueError, match=r"target_values_lds\.pt must hold a tensor of two dimensions, got shape \[3\]"
    ):
        read_dattri(dattri, num_images=4)
    (dattri / "target_values_lds.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"read_dattri: .* cannot be read"):
        read_dattri(dattri, num_images=4)
    (dattri / "target_values_lds.pt").unlink()
    with pytest.raises(FileNotFoundError):
        read_dattri(dattri, num_images=4)


def test_other_content_of_a_bank_is_refused(bergson):
    with pytest.raises(ValueError, match=r"read_bergson: items must lie in \[0, 3\), got 3\.\.3"):
        read_bergson(bergson, num_items=3)
    (bergson / "subsets.json").write_text("[[0]]")
    with pytest.raises(ValueError, match="losses and subsets must be of as many models, got 3 and 1"):
        read_bergson(bergson, num_items=4)
    path = bergson / "query_loss_cache" / "losses_ab12.pt"
    torch.save({"baseline": 1.0}, path)
    with pytest.raises(ValueError, match="must hold losses per_subset of one or two dimensions, got NoneType"):
        read_bergson(bergson, num_items=4)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"query_loss_cache holds no losses_\*\.pt"):
        read_bergson(bergson, num_items=4)
