"""How many states are kept and steps made by each scheme, and runs that are killed, damaged or changed."""

import functools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pyattr.attribution import MAGIC
from pyattr.attribution.magic import Adam, Scheme, replay
from pyattr.attribution.magic.replay import Replay
from pyattr.attribution.magic.schemes import binomial_split, choose
from pyattr.attribution.magic.training import WeightedTraining

ROOT = Path(__file__).resolve().parents[2]


def squares(model, rows, rng):
    return (model(rows) - rows).square().sum(1) * torch.from_numpy(rng.random(len(rows))).to(rows)


def fit_of(model, queries):
    return -(model(queries) - queries).square().sum(1)


def network():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


def rows(count, seed):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def method(directory=None, steps=40, loss=squares, **settings):
    settings = {"batch_size": 2, "optimiser": Adam(learning_rate=0.03), "checkpointing": "sqrt", **settings}
    return MAGIC(network(), loss, fit_of, steps=steps, directory=directory, **settings)


def reversal(name, steps, slots=1, branching=2):
    """Train and walk back; the order of the steps, and what it took."""
    training = WeightedTraining(network(), squares, rows(5, 0), steps=steps, batch_size=2, optimiser=Adam(), seed=0)
    made = Replay(training, torch.ones(5), Scheme(name, steps, branching, slots))
    made.train()
    assert made.advanced == steps
    order = [step for step, _ in made.backwards(steps)]
    assert order == list(range(steps))[::-1]
    return made


@functools.cache
def fewest(length, slots):
    """Steps made again by the best way to reverse some with S states, by trying all."""
    if length == 1:
        return 0
    if slots == 1:
        return length * (length - 1) // 2
    return min(k + fewest(length - k, slots - 1) + fewest(k, slots) for k in range(1, length))


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 21, 30])
def test_binomial_makes_the_fewest_steps(steps, slots):
    made = reversal("binomial", steps, slots)
    assert made.advanced == fewest(steps, slots) + 1  # to the end, which a reversal alone does not need
    assert made.most_states <= slots


@pytest.mark.parametrize("slots", [2, 3, 5, 20])
def test_binomial_splits_are_best(slots):
    for length in range(2, 60):
        k = binomial_split(length, slots)
        assert k + fewest(length - k, slots - 1) + fewest(k, slots) == fewest(length, slots)


@pytest.mark.parametrize("steps", [1, 2, 16, 31])
def test_all_states_make_no_step_again(steps):
    made = reversal("all", steps)
    assert (made.advanced, made.most_states) == (steps, steps)


@pytest.mark.parametrize("steps", [1, 2, 16, 25, 31])
def test_square_roots_train_twice(steps):
    made = reversal("sqrt", steps)
    stride = math.ceil(math.sqrt(steps))
    parts = math.ceil(steps / stride)
    # Each part is made once more but for its last step; the states of the last part are kept by training itself.
    assert made.advanced == steps + (parts - 1) * (stride - 1)
    assert made.most_states <= 2 * stride


@pytest.mark.parametrize(("steps", "branching"), [(27, 3), (32, 2), (30, 4), (1, 2), (5, 8)])
def test_trees_train_once_for_each_level(steps, branching):
    made = reversal("tree", steps, branching=branching)
    levels = next(n for n in range(10) if branching**n >= steps)
    assert made.advanced <= (1 + levels) * steps
    assert made.most_states <= (branching - 1) * levels + 1
    if (steps, branching) == (27, 3):
        # Each level makes again, of every part of k equal ones, all but the last; the last parts are there at first.
        assert made.advanced == 27 + 2 * 6 + 2 * 2 + 6 * 2


def test_the_scheme_follows_from_the_memory():
    assert choose(10, 100, 1100) == Scheme("all", 10)
    assert choose(10, 100, 1099) == Scheme("binomial", 10, slots=9)
    assert choose(10, 100, 200).slots == 1
    assert choose(10, 100, 0, "sqrt").name == "sqrt"
    with pytest.raises(
        ValueError, match="MAGIC: memory must hold at least two states of 100 bytes each, got 199 bytes"
    ):
        choose(10, 100, 199)
    with pytest.raises(ValueError, match="checkpointing must be one of auto, all, sqrt, tree, binomial, got 'none'"):
        choose(10, 100, 1000, "none")
    with pytest.raises(ValueError, match="branching must be at least 2, got 1"):
        choose(10, 100, 1000, "tree", 1)


# Interruptions


class Stop(Exception):
    pass


def stopping(stage, when):
    def progress(done, total, name):
        if (name, done) == (stage, when):
            raise Stop

    return progress


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def every_step(monkeypatch):
    """States and adjoints are saved as if each step took minutes."""
    monkeypatch.setattr(replay.Pace, "due", lambda self: True)


@pytest.mark.parametrize("scheme", ["sqrt", "binomial", "tree", "all"])
def test_interrupted_runs_end_at_the_same_bits(tmp_path, every_step, scheme):
    settings = {"checkpointing": scheme, "memory": 12 * 17 * 6, "branching": 3}
    expected = method(**settings).fit(rows(5, 0)).scores(rows(3, 2))
    for stage, when in (("train", 17), ("train", 39), ("replay", 1), ("replay", 18), ("replay", 39)):
        with pytest.raises(Stop):
            method(tmp_path, progress=stopping(stage, when), **settings).fit(rows(5, 0)).scores(rows(3, 2))
    calls = []
    again = method(tmp_path, progress=lambda *call: calls.append(call), **settings).fit(rows(5, 0))
    assert torch.equal(again.scores(rows(3, 2)), expected)
    assert again.replay.resumed_from == 40
    assert calls[:4] == [(1, 3, "phi"), (2, 3, "phi"), (3, 3, "phi"), (39, 40, "replay")]
    calls.clear()
    assert torch.equal(again.scores(rows(3, 2)), expected)
    assert calls[3:] == [(40, 40, "replay")]  # read, not computed
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir())[0] == "derivatives"
    assert not list(tmp_path.glob("replay-*"))


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_magic_replay import method, rows, replay
torch.set_num_threads(1)
replay.Pace.due = lambda self: True
os.fsync = lambda file: None

def progress(done, total, stage):
    if (stage, done) == ({stage!r}, 23):
        os.kill(os.getpid(), signal.SIGKILL)

method({directory!r}, progress=progress).fit(rows(5, 0)).scores(rows(3, 2))
"""


def test_a_killed_process(tmp_path, every_step):
    torch.set_num_threads(1)
    expected = method().fit(rows(5, 0)).scores(rows(3, 2))
    for stage in ("train", "replay"):
        script = SCRIPT.format(tests=str(Path(__file__).parent), directory=str(tmp_path), stage=stage)
        done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
        assert done.returncode == -signal.SIGKILL
    calls = []
    again = method(tmp_path, progress=lambda *call: calls.append(call)).fit(rows(5, 0))
    assert torch.equal(again.scores(rows(3, 2)), expected)
    assert calls[3] == (23, 40, "replay")


def test_damaged_states_are_made_again(tmp_path, every_step):
    expected = method().fit(rows(5, 0)).scores(rows(3, 2))
    method(tmp_path).fit(rows(5, 0))
    for name in ("state-00000040", "state-00000035"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = method(tmp_path).fit(rows(5, 0))
    assert torch.equal(again.scores(rows(3, 2)), expected)


def test_other_trainings_are_refused(tmp_path):
    method(tmp_path).fit(rows(5, 0))
    with pytest.raises(ValueError, match=r"holds another training \(seed was 0, now 1\): give another directory"):
        method(tmp_path, seed=1).fit(rows(5, 0))
    with pytest.raises(ValueError, match=r"holds another training \(train was "):
        method(tmp_path).fit(rows(5, 1))
    with pytest.raises(ValueError, match=r"holds another training \(weights was "):
        method(tmp_path).fit(rows(5, 0), torch.full((5,), 0.5))
    with pytest.raises(RuntimeError, match="MAGIC: step 0 made again differs from what it was"):
        method(tmp_path, loss=lambda model, rows, rng: 2 * squares(model, rows, rng)).fit(rows(5, 0))


def test_a_step_that_comes_out_otherwise_is_noticed():
    fitted = method().fit(rows(5, 0))
    fitted.replay.training.train[3] += 0.001
    with pytest.raises(RuntimeError, match="made again differs from what it was"):
        fitted.scores(rows(3, 2))
