"""Processes that are interrupted or killed, and the same command run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pyattr.cli import app

TRAIN = ["--steps", "40", "--batch-size", "8", "--threads", "1", "--device", "cpu"]
SCORE = ["--num-timesteps", "1", "--proj-dim", "16", "--threads", "1", "--device", "cpu"]


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "pyattr", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def stop_when(process, number, appears):
    """Send a signal as soon as `appears()` is true."""
    while not appears():
        if process.poll() is not None:
            pytest.fail(f"ended before it could be stopped: {process.communicate()}")
        time.sleep(0.002)
    process.send_signal(number)


def scores(out):
    with np.load(out / "scores.npz") as archive:
        return dict(archive)


def here(*arguments):
    """Run in this process, which has imported everything."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_stopped_and_killed_it_ends_as_if_never_stopped(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", images=rng.integers(0, 256, (320, 8, 8), np.uint8))
    whole, out = tmp_path / "whole", tmp_path / "out"
    train = ["train", "--data", tmp_path / "x.npz", *TRAIN]
    generate = ["generate", "-n", 2, "--steps", 2, "--threads", 1, "--device", "cpu"]
    attribute = ["attribute", *SCORE]
    for command in (train, generate, attribute):  # without a stop
        assert here(*command, "--out", whole)[::2] == (0, "")

    # Ctrl-C while training.
    process = start(*train, "--out", out)
    stop_when(process, signal.SIGINT, lambda: any(out.glob("train-*/checkpoint-*")))
    assert finish(process)[::2] == (130, "pyattr: interrupted: run the same command again to go on from here\n")
    stage = json.loads(next(out.glob("train-*/stage.json")).read_text())
    assert not stage["finished"] and stage["runs"] == 1 and stage["seconds"] > 0
    assert 0 < max(int(path.stem[-8:]) for path in out.glob("train-*/checkpoint-*")) < 40
    # A model that is not finished is none.
    code, _, error = here(*generate, "--out", out)
    assert code == 1 and error.startswith("pyattr: no trained model in ")
    code, told, error = here(*train, "--out", out)
    assert (code, error) == (0, "") and "partly done" in told
    assert here(*generate, "--out", out)[0] == 0

    # Killed while features are made: nothing can be said or cleaned up then.
    process = start(*attribute, "--out", out)
    stop_when(
        process, signal.SIGKILL, lambda: any("shard-" in path.read_text() for path in out.glob("*/train/manifest.json"))
    )
    assert finish(process)[0] == -signal.SIGKILL
    assert not (out / "scores.npz").exists() and not (out / "report.html").exists()
    shard = next(out.glob("dtrak-features-*/train/shard-*.safetensors"))
    made = shard.stat().st_mtime_ns
    code, told, error = here(*attribute, "--out", out)
    assert (code, error) == (0, "") and "partly done" in told
    assert shard.stat().st_mtime_ns == made

    # The same bits.
    found, wanted = scores(out), scores(whole)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
