"""`pyattr evaluate lds`: what it refuses, and what it says then."""

import errno
import tempfile

import numpy as np
import pytest
import safetensors.torch
import torch
from lds_problem import ASKED, MATRICES, TRAIN, make, save

from pyattr.evaluation import GroundTruth, Scores


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make(tmp_path_factory.mktemp("problem"))


NOTHING = (
    "give a folder that holds evaluation.safetensors and scores/, as in `pyattr evaluate lds FOLDER`, or --truth FILE and "
    "files of scores; got "
)
OF_VALIDATION = "of the queries validation: give one of dtrak/1, dtrak/2"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], NOTHING + "nothing"),
        (["nowhere"], NOTHING + "nowhere"),
        (["--truth", "x"], "no scores to judge: give files of scores after --truth FILE"),
        (
            ["{0}", "-t", "elbo", "-t", "l1"],
            "--target must be one of simple, elbo of {0}/evaluation.safetensors, got l1",
        ),
        (["{0}", "--tune", "eta"], "--tune eta: no two files of scores differ in that setting alone"),
        (["{0}", "--against", "D-TRAK"], f"--against D-TRAK names several rows {OF_VALIDATION}"),
        (["{0}", "--against", "TRAK"], f"--against TRAK names no row {OF_VALIDATION}, pixel"),
    ],
)
def test_refusals(problem, pyattr, arguments, line):
    result = pyattr("evaluate", "lds", *(argument.format(problem) for argument in arguments))
    assert (result.exit_code, result.stderr) == (1, f"pyattr: {line.format(problem)}\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["x", "--readout", "mean"], "--readout: must be one of signed, squared, signed-squared, head, got mean"),
        (["x", "--percent", "3"], "--percent: goes with --readout head, got 3 alone"),
        (["x", "--percent", "3", "-r", "squared"], "--percent: goes with --readout head, got 3 alone"),
        (["x", "--tune-on-benchmark"], "--tune-on-benchmark: say which setting is chosen: give --tune"),
    ],
)
def test_options_that_are_wrong(pyattr, arguments, line):
    result = pyattr("evaluate", "lds", *arguments)
    assert (result.exit_code, result.stderr) == (2, f"pyattr: Invalid value for {line}\n")


def test_build_is_a_command_and_no_folder(pyattr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    result = pyattr("evaluate", "lds", "build")
    assert (result.exit_code, result.stderr) == (2, "pyattr: Missing argument 'OUT'.\n")
    assert "build holds no evaluation.safetensors" in pyattr("evaluate", "lds", "./build").stderr


def test_what_lies_in_the_folder_is_checked(problem, tmp_path, pyattr):
    def fails(line):
        result = pyattr("evaluate", "lds", tmp_path, "--plots", tmp_path / "plots")
        assert (result.exit_code, result.stderr) == (1, f"pyattr: {line}\n")

    fails(f"{tmp_path} holds no evaluation.safetensors: make it by `pyattr evaluate lds build {tmp_path} ...`")
    (tmp_path / "evaluation.safetensors").write_bytes((problem / "evaluation.safetensors").read_bytes())
    fails(
        f"{tmp_path} holds no scores: run `pyattr attribute --out {tmp_path}`, or keep some in {tmp_path / 'scores'} by "
        "pyattr.evaluation.Scores.save"
    )
    save(tmp_path, "pixel")
    (tmp_path / "queries.json").write_text('{"a": [0, 7]}')
    fails(
        f'{tmp_path / "queries.json"} must hold ranges of the 6 queries, as in {{"validation": [0, 6]}}, got a [0, 7]'
    )
    (tmp_path / "queries.json").write_text('{"a": [0, 6')
    fails(f"{tmp_path / 'queries.json'} is damaged: delete it and run again")
    (tmp_path / "queries.json").write_text('{"a": [0, 6]}')
    (tmp_path / "images.npz").write_bytes(b"PK")
    fails(f"{tmp_path / 'images.npz'} is damaged or missing: put it back or delete it")
    np.savez(tmp_path / "images.npz", train_images=TRAIN)
    fails(
        f"{tmp_path / 'images.npz'} must hold the training images and queries of the ground truth: put them back or delete it"
    )
    assert not (tmp_path / "plots").exists()
    truth = tmp_path / "evaluation.safetensors"
    truth.write_bytes((content := truth.read_bytes())[:-1] + b"x")
    fails(f"{truth} is damaged (its checksum does not match): delete it and make it again")
    truth.write_bytes(content)
    Scores.of("A", MATRICES["pixel"][1], TRAIN.flip(0), ASKED, signed=True, settings={}).save(
        tmp_path / "scores" / "a.safetensors"
    )
    fails("Scores: A scored other training images than those of the ground truth, or in another order")


def test_nobody_is_told_to_delete_what_they_named(problem, tmp_path, fails):
    """Files of another kind, and damaged ones, are said to be what they are."""
    truth, pixel = problem / "evaluation.safetensors", problem / "scores" / "pixel.safetensors"
    archive, other, mine = problem / "images.npz", tmp_path / "other.safetensors", tmp_path / "mine.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, other)
    mine.write_bytes(truth.read_bytes()[:-1] + b"x")
    command = ["evaluate", "lds", "--truth"]
    wanted = "--truth must be a ground truth, as `pyattr evaluate lds build` writes it, got"
    fails(f"{wanted} {archive}, which is an .npz archive", *command, archive, pixel)
    fails(f"{wanted} {other}, which is a safetensors file that pyattr did not write", *command, other, pixel)
    fails(f"{wanted} {mine}, which is damaged (its checksum does not match)", *command, mine, pixel)
    fails(f"GroundTruth: {pixel} does not hold a ground truth: it is a file of kind 'scores'", *command, pixel, pixel)
    wanted = "scores must be files of pyattr.evaluation.Scores or archives of `pyattr attribute`, got"
    queries = problem / "queries.json"
    (tmp_path / "cut.safetensors").write_bytes(queries.read_bytes())
    told = f"{tmp_path}/cut.safetensors, which is a JSON file"
    fails(f"{wanted} {told}", *command, truth, tmp_path / "cut.safetensors")
    mine.write_bytes(pixel.read_bytes()[:-1] + b"x")
    fails(f"{wanted} {mine}, which is damaged (its checksum does not match)", *command, truth, mine)
    for path, told in ((archive, "an .npz archive"), (truth, "a safetensors file"), (tmp_path / "text", "no JSON")):
        if path.name == "text":
            path.write_text("validation: 0 to 4")
        wanted = f'{path} must hold ranges of the 6 queries, as in {{"validation": [0, 6]}}, got {told}'
        fails(wanted, *command, truth, pixel, "--queries", path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("{}", "{}"),
        ("[[0, 6]]", "[[0, 6]]"),
        ("null", "null"),
        ('{"a": [true, 3]}', "a [true, 3]"),
        ('{"a": [0, true]}', "a [0, true]"),
        ('{"a": [0, 3], "b": [3, 3]}', "b [3, 3]"),
        ('{"a": [0.0, 3]}', "a [0.0, 3]"),
        ('{"a": 3}', "a 3"),
    ],
)
def test_ranges_that_are_none(problem, tmp_path, fails, content, got):
    path = tmp_path / "ranges.json"
    path.write_text(content)
    line = f'{path} must hold ranges of the 6 queries, as in {{"validation": [0, 6]}}, got {got}'
    fails(line, "evaluate", "lds", problem, "--queries", path)


def test_what_cannot_be_written_is_seen_at_the_start(problem, tmp_path, monkeypatch, fails):
    (tmp_path / "file").write_text("")
    command = ["evaluate", "lds", problem]
    monkeypatch.setattr(GroundTruth, "open", lambda path: pytest.fail("the work has begun"))
    wanted = "--json must be a file in a folder that is there and can be written to, got"
    for name, why in (
        ("none/x.json", "No such file or directory"), ("file/x.json", "Not a directory"), ("", "Is a directory")
    ):  # fmt: skip
        fails(f"{wanted} {tmp_path / name} ({why})", *command, "--json", tmp_path / name)
    wanted = "--plots must be a folder that can be made and written to, got"
    for name in ("file", "file/plots"):
        fails(f"{wanted} {tmp_path / name} (Not a directory)", *command, "--plots", tmp_path / name)

    def refuse(dir):
        assert dir == tmp_path  # of a folder that is not there yet the one that it would lie in
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    fails(f"{wanted} {tmp_path}/a/b (Permission denied)", *command, "--plots", tmp_path / "a" / "b")
    wanted = "--json must be a file in a folder that is there and can be written to, got"
    fails(f"{wanted} {tmp_path}/x.json (Permission denied)", *command, "--json", tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
