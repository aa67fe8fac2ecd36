"""The `measure` fixture: nothing wrong is timed, a contender's own seconds are what is recorded, what is left out is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import peers

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = """
import pytest
from bench.contenders import ContenderError
from bench.figures import Goal

GOALS = [
    Goal("toy", "fast", lambda rate: rate("right", "B=1"), 400.0),
    Goal("toy", "faster", lambda rate: rate("right", "B=1"), 401.0),
]

class Contender:
    def __init__(self, answer, error=None):
        self.answer, self.error = answer, error
    def first(self):
        if self.error:
            raise ContenderError(self.error)
        return self.answer, 0.5
    def round(self):
        return 0.25

def check(answer):
    assert answer == 4

@pytest.mark.parametrize("row, contender", [
    ("right", Contender(4)), ("wrong", Contender(5)), ("absent", Contender(4, "no such library")),
])
def test_toy(row, contender, measure):
    measure(contender, check=check, table="toy", row=row, column="B=1", ours=row == "right",
            work=100, unit="sums", bytes=10, rounds=5, kind="adding", extra={"peak_mib": 7})
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """pytest's status and output, and the recorded run of a module with a right, a wrong and a missing contender."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "bench_toy.py").write_text(BENCHMARKS)
    # Where the tests run in several processes, each says so, and pytest-benchmark would not measure.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "bench.conftest", "-p", "no:cacheprovider", "-q", "bench_toy.py",
            "--benchmark-json=run.json", "--bench-seconds=1",
        ],
        cwd=folder,
        env={**outside, "PYTHONPATH": str(ROOT), "CXX": "/nowhere/c++"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, json.loads((folder / "run.json").read_text())


def test_a_wrong_answer_fails_and_is_not_recorded(session):
    status, printed, run = session
    assert status == 1 and "1 failed, 1 passed, 1 skipped" in printed
    assert [figure["extra_info"]["row"] for figure in run["benchmarks"]] == ["right"]


def test_the_seconds_are_the_contenders_own(session):
    [figure] = session[2]["benchmarks"]
    # 1 s for a first run of 0.5 s makes two rounds, three at least.
    assert (figure["stats"]["rounds"], figure["stats"]["min"], figure["stats"]["max"]) == (3, 0.25, 0.25)
    info = figure["extra_info"]
    assert (info["work_per_s"], info["bytes_per_s"], info["peak_mib"], info["kind"]) == (400.0, 40.0, 7, "adding")


def test_what_is_left_out_and_what_was_wanted_are_recorded(session):
    run = session[2]
    assert run["skipped"] == [{"table": "toy", "row": "absent", "column": "B=1", "reason": "no such library"}]
    assert [(goal["text"], goal["met"]) for goal in run["goals"]] == [("fast", True), ("faster", False)]


def test_the_run_says_which_machine_and_commit(session):
    machine = session[2]["machine_info"]
    assert machine["ceilings"] == {"not_measured": "no C++ compiler: /nowhere/c++"}
    assert machine["cores"] >= 1 and machine["commit"] and machine["versions"]["torch"]
    assert machine["slug"].startswith(f"{machine['cores']}-core-")


def test_half_an_installation_of_the_peers_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "environment")
    assert "run `python -m bench.peers`" in peers.missing()
    peers.FOLDER.mkdir()
    assert peers.missing()
    peers._stamp().write_text(json.dumps(peers._wanted()))
    assert peers.missing() is None
    monkeypatch.setattr(peers, "PEERS", ["traker==0.3.3"])
    assert peers.missing()
