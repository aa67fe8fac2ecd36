"""Which files `pyattr evaluate lds --plots` joins by a line: synthetic ones, whose settings alone count."""

import dataclasses
import json

import numpy as np
import pytest

from pyattr.attribution import Readout
from pyattr.cli.lds_lines import panels
from pyattr.cli.options import ScoreOptions, own_options
from pyattr.cli.score_files import score_files
from pyattr.evaluation import GroundTruth, Scores, subsets
from pyattr.evaluation.scoreboard import Scoreboard, distinguishing, other_settings

IMAGES, QUERIES = 10, 3
TRUTH = GroundTruth(
    subsets(IMAGES, 8), np.random.default_rng(0).standard_normal((1, 8, 1, 1, QUERIES)), ("simple",), np.arange(QUERIES),
    "images", tuple("abc"), {},
)  # fmt: skip
BOARD = Scoreboard(TRUTH, "simple", {"signed": Readout("signed")}, {"all": np.arange(QUERIES)})


def matrix(seed):
    return np.random.default_rng(seed).standard_normal((QUERIES, IMAGES)).astype(np.float32)


@pytest.fixture
def archives(tmp_path):
    """Writes what `pyattr attribute` writes of one method with these settings, a file for each."""

    def write(*settings):
        paths = []
        for number, given in enumerate(settings):
            own = {
                "method": "dtrak",
                "name": "D-TRAK",
                "num_timesteps": 10,
                "num_noises": 1,
                "query_noises": 1,
                "lambda_": None,
                "lambda": 100.0 + number,
                "model": "m",
                "readout": {"name": "signed", "percent": None},
            }
            paths.append(tmp_path / f"{number}.npz")
            np.savez(
                paths[-1],
                scores=matrix(number),
                images_hash="images",
                query_hashes=list("abc"),
                signed=[True],
                settings=json.dumps({"methods": [own | given]}),
            )
        return paths

    return write  # fmt: skip


def lines(paths, board=BOARD):
    """By setting the labels and values of the lines."""
    files = {path.stem: score_files(path, path.stem)[path.stem] for path in paths}
    rows = [row for name, file in files.items() for row in board.rows(name, file.open())]
    found = panels(board, rows, files)
    return {
        setting: sorted((line.label, tuple(line.values)) for line in groups["all"]) for setting, groups in found.items()
    }


@pytest.mark.parametrize("name", ["num_timesteps", "proj_dim", "query_noises", "normalize_by", "eta"])
def test_lambda_that_was_chosen_automatically_makes_no_difference(archives, name):
    assert lines(archives({name: 4}, {name: 1}, {name: 2})) == {name: [("D-TRAK", (1, 2, 4))]}


def test_lambda_that_was_given_does(archives):
    given = [{"num_timesteps": k, "lambda_": float(k), "lambda": float(k)} for k in (1, 2)]
    assert lines(archives(*given)) == {}
    # Each kind of choice has a line of its own, called by it; another grid is another choice.
    same = [{"num_timesteps": k, "lambda_": 5.0, "lambda": 5.0} for k in (1, 2)]
    free = [{"num_timesteps": k} for k in (1, 2, 3)]
    grids = [{"num_timesteps": k, "lambda_": [1.0, 9.0], "lambda": 9.0 - k} for k in (1, 2)]
    assert lines(archives(*same, *free, *grids))["num_timesteps"] == [
        ("D-TRAK, lambda=5", (1, 2)),
        ("D-TRAK, lambda=chosen automatically", (1, 2, 3)),
        ("D-TRAK, lambda=chosen automatically among 1, 9", (1, 2)),
    ]


def test_against_lambda_a_chosen_value_is_one_of_the_values(archives):
    assert lines(archives({"lambda": 7.5}, {"lambda_": 1.0, "lambda": 1.0})) == {"lambda": [("D-TRAK", (1.0, 7.5))]}


def test_steps_of_one_training(archives):
    def at(training, step):
        return {"model": f"{training}{step}", "step": step, "training": training}

    assert lines(archives(at("t", 30), at("t", 10), at("t", 20))) == {"step": [("D-TRAK", (10, 20, 30))]}
    # Of another training they are another line, or none.
    assert lines(archives(at("t", 10), at("u", 20))) == {}
    found = lines(archives(at("t", 10), at("t", 20), at("u", 10), at("u", 20)))
    assert [values for _, values in found["step"]] == [(10, 20)] * 2
    assert all(label.startswith("D-TRAK, training=") for label, _ in found["step"])
    # So are those of another setting.
    assert lines(archives(at("t", 10), {**at("t", 20), "num_timesteps": 4})) == {}


def test_noises_of_queries_go_with_those_of_images(archives):
    both = [{"num_noises": n, "query_noises": n} for n in (1, 4)]
    assert lines(archives(*both)) == {"num_noises": [("D-TRAK", (1, 4))]}
    found = lines(archives(*both, {"num_noises": 1, "query_noises": 4}))
    assert found == {
        "num_noises": [("D-TRAK, query_noises=4", (1, 4)), ("D-TRAK, query_noises=num_noises", (1, 4))],
        "query_noises": [("D-TRAK", (1, 4))],
    }


def test_a_setting_that_stands_in_the_name(archives):
    settings = [{"method": "trak", "name": f"TRAK of interpolate {eta}", "feature": "interpolate", "eta": eta}
                for eta in (0.5, 0.75)]  # fmt: skip
    assert lines(archives(*settings)) == {"eta": [("TRAK", (0.5, 0.75))]}


def test_ensembles_that_grow(archives):
    def of(models, **more):
        several = {"models": len(models), "model": list(models), "name": f"D-TRAK, mean of {len(models)} models"}
        return {"lambda": [1.0] * len(models), **several, **more} if len(models) > 1 else {"model": models, **more}

    assert lines(archives(of("abc"), of("a"), of("ab"))) == {"models": [("D-TRAK", (1, 2, 3))]}
    # Others than the first are in no line, or in one of their own.
    found = lines(archives(of("ab"), of("a"), of("b"), of("bcd"), of("c")))["models"]
    assert sorted(values for _, values in found) == [(1, 2), (1, 3)]
    assert all(label.startswith("D-TRAK, model=") for label, _ in found)
    assert lines(archives(of("ab"), of("cde"))) == {}
    # Members may be at different steps of their trainings.
    steps = [of("a", step=1, training="t"), of("ab", step=[1, 2], training=["t", "u"])]
    assert lines(archives(*steps)) == {"models": [("D-TRAK", (1, 2))]}


def test_files_of_scores_say_themselves_what_was_chosen(tmp_path):
    def files(*settings, signed=True):
        paths = [tmp_path / f"{number}.safetensors" for number in range(len(settings))]
        for path, given in zip(paths, settings, strict=True):
            Scores(matrix(1), "TRAK", signed, given, "images", tuple("abc")).save(path)
        return paths

    settings = [{"timesteps": k, "lambda": 0.5 * k} for k in (1, 2)]
    assert lines(files(*settings)) == {}
    told = [{**each, "chosen": {"lambda": "automatically"}} for each in settings]
    assert lines(files(*told)) == {"timesteps": [("TRAK", (1, 2))]}
    # Scores with a sign and without are never joined.
    mixed = files(*settings[:1] * 2, {"timesteps": 2, "lambda": 0.5})
    Scores(matrix(1), "TRAK", False, settings[0], "images", tuple("abc")).save(mixed[0])
    mixed[1].unlink()
    assert lines([mixed[0], mixed[2]]) == {}
    # The name is free for other things.
    assert lines(files(*({"D": d, "chosen": True} for d in (1, 2)))) == {"D": [("TRAK", (1, 2))]}


def test_what_was_chosen_in_words():
    settings = {"K": 10, "lambda": 0.5, "chosen": {"lambda": "automatically"}}
    assert other_settings(settings, "K") == {"lambda": "chosen automatically"}
    assert other_settings(settings, "lambda") == {"K": 10}
    scores = Scores(matrix(1), "TRAK", True, settings, "images", tuple("abc"))
    rows = BOARD.rows("a", scores) + BOARD.rows("b", dataclasses.replace(scores, settings={"K": 10, "lambda": 2.0}))
    assert distinguishing(rows) == {("a", "signed"): "lambda=0.5 (chosen automatically)", ("b", "signed"): "lambda=2"}
    rows = rows[:1] + BOARD.rows("b", dataclasses.replace(scores, settings={**settings, "lambda": 2.0}))
    assert distinguishing(rows) == {("a", "signed"): "lambda=0.5", ("b", "signed"): "lambda=2"}


def test_options_of_other_methods_are_no_settings():
    every = {field.name for field in dataclasses.fields(ScoreOptions)}
    others = {"residuals", "leverage", "checkpoints", "probes", "train_probes"}
    solved = {"lambda_", "solve_dtype"}
    lacks = {
        "dtrak": others,
        "das": others - {"residuals", "leverage"},
        "probed-das": (others | {"solve_dtype"}) - {"probes", "train_probes"},
        "gradient-dot": others | solved,
        "gas": (others | solved) - {"checkpoints"},
    }
    assert {name: every - set(own_options(ScoreOptions(name))) for name in lacks} == lacks
