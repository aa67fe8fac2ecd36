"""Contenders in this process and in workers of their own."""

import sys

import pytest
import torch

from bench import contenders
from bench.contenders import ContenderError, Here, Process, Worker
from pyattr.ops import rademacher_project


@pytest.fixture(scope="module")
def process():
    process = Process(sys.executable, {"PYATTR_BACKEND": ""})
    yield process
    process.close()


@pytest.fixture
def x():
    return torch.randn(3, 200)


def test_a_call_here_gives_its_answer_and_times():
    calls = []
    contender = Here(lambda: calls.append(1) or len(calls))
    answer, seconds = contender.first()
    assert answer == 1 and seconds > 0 and contender.round() > 0 and len(calls) == 2


def test_a_worker_answers_as_this_process_does(process, x):
    worker = Worker("pyattr", x, process, proj_dim=40, kind="rademacher", seed=3, backend="reference")
    answer, seconds = worker.first()
    assert torch.equal(answer, rademacher_project(x, 40, seed=3, backend="reference"))
    assert seconds > 0 and worker.round() > 0
    assert worker.about["torch"] == torch.__version__


def test_a_failure_in_a_worker_is_raised_here_and_the_worker_goes_on(process, x):
    with pytest.raises(ContenderError, match="ValueError: rademacher_project: backend must be one of"):
        Worker("pyattr", x, process, proj_dim=4, kind="rademacher", seed=3, backend="abacus").first()
    assert process.alive
    Worker("pyattr", x, process, proj_dim=4, kind="rademacher", seed=3, backend="reference").first()


def test_a_worker_that_dies_says_why(x, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such interpreter >&2\nexit 3\n")
    broken.chmod(0o755)
    process = Process(broken)
    with pytest.raises(ContenderError, match="status 3: no such interpreter"):
        Worker("pyattr", x, process, proj_dim=4, kind="rademacher", seed=3).first()
    process.close()


def test_a_worker_that_hangs_is_ended(x, tmp_path):
    hung = tmp_path / "python"
    hung.write_text("#!/bin/sh\nexec sleep 60\n")
    hung.chmod(0o755)
    process = Process(hung, seconds=0.2)
    with pytest.raises(ContenderError, match="no answer within"):
        Worker("pyattr", x, process, proj_dim=4, kind="rademacher", seed=3).first()
    process.close()
    assert not process.alive


def test_one_process_is_kept_for_each_interpreter_and_environment():
    first = contenders.process(sys.executable, {"PYATTR_SIMD": "scalar"})
    try:
        assert contenders.process(sys.executable, {"PYATTR_SIMD": "scalar"}) is first
        first._process.kill()
        first._process.wait()
        assert contenders.process(sys.executable, {"PYATTR_SIMD": "scalar"}) is not first
    finally:
        contenders.close_all()
