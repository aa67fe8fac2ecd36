"""Files of scores: what rounding to float16 may change, and what it may not."""

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pyattr.diffusion import DamagedFileError, Samples
from pyattr.diffusion.storage import data_hash, load_tensors, save_tensors
from pyattr.evaluation import GroundTruth, Scores, subsets
from pyattr.evaluation.ground_truth import image_hashes

IMAGES = torch.arange(4 * 4, dtype=torch.uint8).reshape(4, 1, 2, 2)
QUERIES = 100 + torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 1, 2, 2)
MATRIX = np.array([[1, -2, 0.5, 0], [3e-38, 1e-40, 0, -3e-38], [2e38, -1e30, np.inf, np.nan]], np.float32)


def scores(**changes):
    given = {
        "matrix": MATRIX,
        "method": "D-TRAK",
        "signed": True,
        "settings": {"K": 10},
        "images": data_hash(IMAGES),
        "queries": tuple(image_hashes(QUERIES)),
    }
    return Scores(**{**given, **changes})


def truth(**changes):
    given = {
        "masks": subsets(4, 5),
        "losses": np.zeros((1, 5, 1, 1, 3)),
        "targets": ("simple",),
        "query_ids": np.arange(3),
        "images": data_hash(IMAGES),
        "queries": tuple(image_hashes(QUERIES)),
        "settings": {},
    }
    return GroundTruth(**{**given, **changes})


def saved(made, path):
    made.save(path)
    return Scores.open(path)


def test_a_file_gives_back_what_was_saved(tmp_path):
    made = scores(signed=False)
    again = saved(made, tmp_path / "scores.safetensors")
    for name in ("method", "signed", "settings", "images", "queries"):
        assert getattr(again, name) == getattr(made, name)
    assert again.matrix.dtype == np.float32
    np.testing.assert_array_equal(again.matrix[0], MATRIX[0])  # these need no rounding
    np.testing.assert_allclose(again.matrix[1], MATRIX[1], rtol=2**-11, atol=3e-38 * 2**-23)
    np.testing.assert_allclose(again.matrix[2], MATRIX[2], rtol=2**-11)
    tensors, _ = load_tensors(tmp_path / "scores.safetensors")
    assert tensors["scores"].dtype == torch.float16 and tensors["scores"][0].tolist() == [2**13, -(2**14), 2**12, 0]
    assert tensors["factors"].tolist()[0] == 2**-13
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32,
        st.tuples(st.integers(0, 3), st.integers(0, 5)),
        elements=st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False),
    )
)
def test_rounding_is_bounded(tmp_path_factory, matrix):
    made = scores(matrix=matrix, queries=("q",) * len(matrix))
    again = saved(made, tmp_path_factory.mktemp("scores") / "x.safetensors").matrix
    largest = np.abs(matrix).max(1, initial=0, keepdims=True).astype(np.float64)
    small = np.abs(matrix) < largest * 2**-28
    error = np.abs(again.astype(np.float64) - matrix)
    # Of denormal numbers the step is that of the least factor.
    assert (error <= np.where(small, largest * 2**-39, np.abs(matrix) * 2.0**-11) + 2.0**-151).all()
    assert ((again == 0) | (np.sign(again) == np.sign(matrix))).all()


def test_scores_of_a_method():
    made = Scores.of(
        "TRAK", torch.tensor(MATRIX).double(), IMAGES.numpy(), QUERIES, signed=True, settings={"lambda": 0.1}
    )
    np.testing.assert_array_equal(made.matrix, MATRIX)
    assert (made.images, made.queries) == (truth().images, truth().queries)
    samples = Samples(QUERIES, torch.arange(3), QUERIES[:, None].float(), None, torch.arange(1), {})
    assert Scores.of("TRAK", MATRIX, IMAGES, samples, signed=True, settings={}).queries == made.queries
    with pytest.raises(ValueError, match="Scores: scores must have a column for each of 3 images, got 4"):
        Scores.of("TRAK", MATRIX, IMAGES[:3], QUERIES, signed=True, settings={})
    with pytest.raises(ValueError, match="Scores: queries must be as many as rows, 3, got 2"):
        Scores.of("TRAK", MATRIX, IMAGES, QUERIES[:2], signed=True, settings={})


@pytest.mark.parametrize(
    ("rows", "expected"), [([2, 0], [2, 0]), (np.array([True, False, True]), [0, 2]), (slice(1, None), [1, 2])]
)
def test_some_queries(rows, expected):
    made = scores().take(rows)
    np.testing.assert_array_equal(made.matrix, MATRIX[expected])
    assert made.queries == tuple(image_hashes(QUERIES[expected]))
    np.testing.assert_array_equal(made.rows_in(truth()), expected)


def test_scores_of_something_else():
    other = "Scores: D-TRAK scored other training images than those of the ground truth, or in another order"
    with pytest.raises(ValueError, match=other):
        scores().rows_in(truth(images=data_hash(IMAGES.flip(0))))
    with pytest.raises(ValueError, match=other):
        scores(matrix=MATRIX[:, :3]).rows_in(truth(images=None))
    with pytest.raises(ValueError, match="Scores: D-TRAK: queries must be among those of the ground truth"):
        scores(queries=("a", "b", "c")).rows_in(truth())
    assert scores(queries=("a", "b", "c")).rows_in(truth(queries=None)).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="Scores: D-TRAK scored 2 queries, and the ground truth has 3"):
        scores().take([0, 1]).rows_in(truth(queries=None))


def test_a_method_is_not_judged_by_models_that_it_asked(tmp_path):
    pool = truth(masks=subsets(4, 2, pool="retraining"), losses=np.zeros((1, 2, 1, 1, 3)))
    made = Scores.of("Datamodel", MATRIX, IMAGES, QUERIES, signed=True, settings={}, pool=pool)
    masks = subsets(4, 5)
    masks[3] = pool.masks[1]
    for found in (made, made.take([1]), saved(made, tmp_path / "scores.safetensors")):
        with pytest.raises(ValueError, match="Scores: Datamodel has asked models of this ground truth's subsets"):
            found.rows_in(truth(masks=masks))
    others = ~pool.masks[:1].repeat(3, 0)
    assert made.rows_in(truth(masks=others, losses=np.zeros((1, 3, 1, 1, 3)))).tolist() == [0, 1, 2]
    alike = Scores.of("TRAK", MATRIX, IMAGES, QUERIES, signed=True, settings={})
    assert alike.rows_in(truth(masks=masks)).tolist() == [0, 1, 2]


def test_what_was_chosen_stays_beside_the_settings(tmp_path):
    tuned = {"lambda": {"grid": [1 / 3, 2e-7], "chosen": {"validation": [2e-7, 1 / 3]}}}
    made = Scores.of("TRAK, tuned", MATRIX, IMAGES, QUERIES, signed=True, settings={"D": 2}, tuned=tuned)
    for found in (made, made.take([1]), saved(made, tmp_path / "scores.safetensors")):
        assert found.tuned == tuned and found.settings == {"D": 2}
    assert scores().tuned == {}


@pytest.mark.parametrize("name", ["asked", "tuned"])
def test_files_from_before_all_of_it_was_told(tmp_path, name):
    path = tmp_path / "scores.safetensors"
    scores().save(path)
    tensors, record = load_tensors(path)
    assert name in record
    save_tensors(path, tensors, {key: value for key, value in record.items() if key != name})
    assert not getattr(Scores.open(path), name) and Scores.open(path).queries == scores().queries


def test_files_that_are_damaged_or_something_else(tmp_path):
    path = tmp_path / "scores.safetensors"
    scores().save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="is damaged"):
        Scores.open(path)
    save_tensors(path, {"masks": torch.zeros(1)}, {"kind": "ground truth"})
    with pytest.raises(ValueError, match="does not hold scores"):
        Scores.open(path)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Scores: matrix must be float32 of shape \[Q, N\], got float64, \[3, 4\]"):
        scores(matrix=MATRIX.astype(np.float64))
    with pytest.raises(ValueError, match=r"Scores: matrix must be float32 of shape \[Q, N\], got float32, \[4\]"):
        scores(matrix=MATRIX[0])
