import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr.attribution import READOUTS, Readout, readout

SCORES = torch.tensor([[1.0, -3.0, 2.0, -0.5], [0.0, 0.25, -0.25, 4.0]])


def test_by_hand():
    assert torch.equal(readout(SCORES, "signed"), SCORES)
    assert readout(SCORES, "squared").tolist() == [[1, 9, 4, 0.25], [0, 0.0625, 0.0625, 16]]
    assert readout(SCORES, "signed_squared").tolist() == [[1, -9, 4, -0.25], [0, 0.0625, -0.0625, 16]]
    assert readout(SCORES, Readout("head", 50)).tolist() == [[0, -3, 2, 0], [0, 0.25, 0, 4]]  # of two equal the first
    assert readout(SCORES, Readout("head", 50.1)).tolist() == [[1, -3, 2, 0], [0, 0.25, -0.25, 4]]  # rounded up
    assert torch.equal(readout(SCORES, Readout("head", 100)), SCORES)


def test_signs():
    assert [Readout(name, 5 if name == "head" else None).signed for name in READOUTS] == [True, False, True, True]


@given(st.integers(1, 400), st.integers(1, 1000), st.integers(0, 9))
def test_the_head_has_its_size(count, tenths, seed):
    percent = tenths / 10
    scores = torch.randn(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = readout(scores, Readout("head", percent))
    size = -(-count * tenths // 1000)
    for row, before in zip(kept, scores, strict=True):
        (where,) = row.nonzero(as_tuple=True)
        assert len(where) == size and torch.equal(row[where], before[where])
        rest = before[row == 0].abs()
        assert len(rest) == 0 or before[where].abs().min() >= rest.max()


def test_not_a_number_is_not_hidden():
    scores = torch.tensor([[float("nan"), 1.0, float("nan"), 2.0]])
    kept = readout(scores, Readout("head", 25))
    assert kept.isnan().tolist() == [[True, False, True, False]] and kept[0, 1] == kept[0, 3] == 0


def test_other_arrays_and_no_scores():
    found = readout(SCORES.numpy(), Readout("head", 25))
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    assert found.tolist() == [[0, -3, 0, 0], [0, 0, 0, 4]]
    assert torch.equal(readout(SCORES.half(), "squared"), SCORES.half().square())
    for shape in ((0, 4), (2, 0)):
        for kind in ("squared", "signed_squared", Readout("head", 5)):
            assert readout(torch.empty(shape), kind).shape == shape


def test_refusals():
    with pytest.raises(
        ValueError, match="Readout: name must be one of signed, squared, signed_squared, head, got 'cube'"
    ):
        readout(SCORES, "cube")
    for arguments in (("head",), ("squared", 5)):
        with pytest.raises(ValueError, match="Readout: percent goes with head and with nothing else, got"):
            Readout(*arguments)
    for percent in (0, -1, 101, float("nan")):
        with pytest.raises(ValueError, match=r"Readout: percent must lie in \(0, 100\], got"):
            Readout("head", percent)
    with pytest.raises(ValueError, match=r"Readout: scores must have shape \[Q, N\], got \[4\]"):
        readout(SCORES[0], "signed")
    with pytest.raises(TypeError, match=r"Readout: scores must be floating point, got torch.int64"):
        readout(SCORES.long(), "signed")
