"""Commands of ensembles that are killed in the middle, and run again: the same bits, and nothing done twice."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyattr.diffusion.storage import load_tensors

# A process that kills itself as soon as more than so many units of a stage are done: nothing can be said or cleaned up then.
KILLED = """
import os, signal, sys
from pyattr.cli import app
from pyattr.cli.display import Display

stage, units, told = sys.argv[1], int(sys.argv[2]), Display.progress

def progress(self, done, total, which):
    told(self, done, total, which)
    if which == stage and done > units:
        os.kill(os.getpid(), signal.SIGKILL)

Display.progress = progress
app(sys.argv[3:])
"""
SAMPLE = ["-n", 3, "--steps", 4, "--batch-size", 1, "--threads", 1]
ONE = ["--batch-size", 1, "--threads", 1]


@pytest.fixture(scope="module")
def sampled(class_ensemble, tmp_path_factory, succeeds):
    out = tmp_path_factory.mktemp("sampled") / "out"
    shutil.copytree(class_ensemble, out)
    succeeds("ensemble", "sample", "--out", out, *SAMPLE)
    return out


@pytest.fixture(scope="module")
def whole(sampled, tmp_path_factory, succeeds):
    """Without a stop."""
    out = tmp_path_factory.mktemp("whole") / "out"
    shutil.copytree(sampled, out)
    succeeds("ensemble", "ablate", "--out", out, *ONE)
    succeeds("ensemble", "search", "--out", out, "--top", 2, *ONE)
    succeeds("ensemble", "evaluate", "--out", out, "--jacobian-batch-size", 1, "--epochs", 2, *ONE)
    return out


def complete(out):
    """The files of finished batches and states, and when they were written."""
    return {
        path: path.stat().st_mtime_ns
        for path in out.glob("*/*.safetensors")
        if "unfinished" not in path.name and path.name != "classifier.safetensors"
    }


def same(ours, theirs):
    if ours.suffix == ".safetensors":
        (tensors, record), (wanted, wanted_record) = load_tensors(ours), load_tensors(theirs)
        return record == wanted_record and all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    if ours.suffix == ".npz":
        with np.load(ours) as found, np.load(theirs) as wanted:
            return found.files == wanted.files and all(np.array_equal(found[n], wanted[n]) for n in wanted.files)
    return ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("command", "stage", "units", "made", "results"),
    [
        # In the second of three images of four steps.
        (["sample", *SAMPLE], "sample", 5, ["ensemble-samples-*/samples-00000000*"], ["ensemble-samples-*/*-0000*"]),
        # In the third of nine images.
        (
            ["ablate", *ONE],
            "counterfactual",
            9,
            ["ensemble-ablation-*/counterfactual-00000000*", "ensemble-ablation-*/counterfactual-00000001*"],
            ["ensemble-ablation.npz"],
        ),
        (
            ["search", "--top", 2, *ONE],
            "jacobian",
            5,
            ["ensemble-jacobian-*/jacobian-00000000*"],
            ["ensemble-scores.npz"],
        ),
        # In the second of the stages that need the Jacobian, when five are behind it.
        (
            ["evaluate", "--jacobian-batch-size", 1, "--epochs", 2, *ONE],
            "last_step",
            5,
            ["ensemble-jacobian-*/jacobian-00000002*", "ensemble-baselines-*/last_step-00000000*"],
            ["ensemble-evaluation.json"],
        ),
    ],
    ids=["sample", "ablate", "search", "evaluate"],
)
def test_killed_in_the_middle(class_ensemble, sampled, whole, tmp_path, succeeds, command, stage, units, made, results):
    out = tmp_path / "out"
    shutil.copytree(class_ensemble if command[0] == "sample" else sampled, out)
    started = complete(out)
    arguments = [str(each) for each in ["ensemble", *command, "--out", out]]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, stage, str(units), *arguments], env=environment, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    for pattern in results:
        assert len(list(out.glob(pattern))) < len(list(whole.glob(pattern)))
    done = complete(out)
    assert done.keys() > started.keys() and all(len(list(out.glob(pattern))) == 1 for pattern in made)
    assert "partly done" in succeeds(*arguments)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for pattern in results:
        wanted = sorted(path.relative_to(whole) for path in whole.glob(pattern))
        assert sorted(path.relative_to(out) for path in out.glob(pattern)) == wanted
        assert all(same(out / path, whole / path) for path in wanted)
