"""Results as JSON."""

import json

import numpy as np
import pytest

from pyattr.evaluation import compare, compare_paired, share
from pyattr.report.numbers import write_results


def test_results_as_json(tmp_path):
    found = {
        "share": share([True, False, False, False]),
        "test": compare([3.0, 4.0], [1.0, 2.0], alternative="greater"),
        "paired": compare_paired([3.0, 4.0], [1.0, 1.0]),
        "array": np.array([[1.23456789, np.nan]]),
        "counts": np.arange(3),
        "number": np.float32(2.0),
        "median": np.array(0.123456789),
        "none": None,
        "words": "as they are",
    }
    write_results(tmp_path / "x.json", found)
    read = json.loads((tmp_path / "x.json").read_text())
    assert read["share"]["percent"] == 25 and read["share"]["of"] == 4
    assert read["test"] == {"p": pytest.approx(1 / 6, rel=1e-4), "effect": 1, "counts": [2, 2]}
    assert read["paired"] == {"effect": 1, "difference": 2.5, "count": 2, "p": 0.5}
    assert (read["array"], read["counts"], read["number"]) == ([[1.2346, None]], [0, 1, 2], 2.0)
    assert (read["median"], read["none"]) == (0.12346, None)
    assert read["words"] == "as they are"
