"""``python -m bench.gpu``: order, resumption, time limits, and what it says where there is no GPU."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """bench.gpu as on a machine with a GPU, its state in a temporary folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu

    monkeypatch.setattr(gpu, "no_gpu", lambda: "")
    monkeypatch.setattr(gpu, "state_path", lambda: tmp_path / "state.steps")
    monkeypatch.setattr(gpu, "digest", lambda: "these sources")
    return gpu


def scripted(gpu, monkeypatch, log, *codes, skip="", name="step"):
    """Steps that write their name to a log and end as told."""

    def step(i, code):
        program = f"open({str(log)!r}, 'a').write('{i}\\n'); {code}"
        return gpu.Step(f"{name} {i}", [sys.executable, "-c", program], 1, skip=skip if i == 1 else "")

    todo = [gpu.Step("build", [sys.executable, "-c", "pass"], 1)]
    todo += [step(i, code) for i, code in enumerate(codes)]
    monkeypatch.setattr(gpu, "steps", lambda ops, wheels: todo)


def ran(log):
    return log.read_text().split() if log.exists() else []


def test_goes_on_where_the_last_call_ended(gpu, monkeypatch, tmp_path, capfd):
    log = tmp_path / "log"
    scripted(gpu, monkeypatch, log, "pass", "raise SystemExit(3)", "pass")
    assert gpu.work(["rademacher_project"], None, 60) == 1
    assert ran(log) == ["0", "1", "2"]
    assert "failed    step 1: status 3" in capfd.readouterr().out

    scripted(gpu, monkeypatch, log, "pass", "pass", "pass")
    assert gpu.work(["rademacher_project"], None, 60) == 0
    assert ran(log) == ["0", "1", "2", "1"]
    kept = json.loads((tmp_path / "state.steps").read_text())
    assert {step["state"] for step in kept["steps"].values()} == {"done"}

    monkeypatch.setattr(gpu, "digest", lambda: "others")
    assert gpu.work(["rademacher_project"], None, 60) == 0
    assert ran(log) == ["0", "1", "2", "1", "0", "1", "2"]


def test_names_what_it_skips_and_why(gpu, monkeypatch, tmp_path, capfd):
    scripted(gpu, monkeypatch, tmp_path / "log", "pass", "pass", skip="no compute-sanitizer on PATH")
    assert gpu.work(["rademacher_project"], None, 60) == 0
    assert "skipped   step 1: no compute-sanitizer on PATH" in capfd.readouterr().out
    assert ran(tmp_path / "log") == ["0"]


def test_stops_a_step_that_takes_too_long_and_leaves_the_rest(gpu, monkeypatch, tmp_path, capfd):
    scripted(gpu, monkeypatch, tmp_path / "log", "import time; time.sleep(600)", "pass")
    assert gpu.work(["rademacher_project"], None, 3) == 1
    said = capfd.readouterr().out
    assert "too slow  step 0: stopped after" in said and "left      step 1:" in said


def test_a_failed_build_ends_the_call(gpu, monkeypatch, tmp_path, capfd):
    build = gpu.Step("build", [sys.executable, "-c", "raise SystemExit(1)"], 1)
    monkeypatch.setattr(gpu, "steps", lambda ops, wheels: [build, gpu.Step("GPU tests", ["false"], 1)])
    assert gpu.work(["rademacher_project"], None, 60) == 1
    assert "left      GPU tests: an earlier step did not end well" in capfd.readouterr().out


def test_steps_of_an_op(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "architecture", lambda: "90a")
    monkeypatch.setattr(gpu, "missing_packages", lambda: ["pybind11"])
    found = gpu.steps(["gaussian_project"], ROOT)
    assert [step.name for step in found[:3]] == ["packages", "build", "GPU tests"]
    assert found[0].command[3:] == ["install", "--no-index", "--find-links", str(ROOT), "pybind11"]
    assert found[1].environment == {"PYATTR_CUDA": "on", "PYATTR_CUDA_ARCHITECTURES": "90a"}
    assert not any("rademacher" in step.name for step in found)
    assert all(step.seconds < gpu.CALL_SECONDS for step in found)
    for step in found:  # every file that a step names is there
        assert all((ROOT / word).exists() for word in step.command if word.startswith("tests/"))


def test_the_ops_are_those_that_are_registered(gpu):
    from pyattr import backends

    assert list(gpu.OPS) == sorted(backends.report())


def test_packages_that_are_absent_or_too_old_are_installed(gpu, monkeypatch):
    installed = {name.partition(">=")[0]: "99.1" for name in gpu.PACKAGES} | {"setuptools": "68.2.post1", "pytest": "8"}
    del installed["scipy"]

    def version(name):
        if name not in installed:
            raise gpu.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(gpu.importlib.metadata, "version", version)
    assert gpu.missing_packages() == ["setuptools>=77", "scipy"]


@pytest.mark.parametrize(
    "changed", ["CMakeLists.txt", "tests/conftest.py", "csrc/cuda/architectures.cmake", "bench/gpu.py"]
)
def test_every_source_counts(monkeypatch, tmp_path, changed):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu

    for source in gpu.SOURCES:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, tmp_path / source)
    before = gpu.digest()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.digest() == before
    with open(tmp_path / changed, "a", encoding="utf8") as file:
        file.write("\n# another\n")
    assert gpu.digest() != before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_each_step_is_named_and_skipped(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu

    assert gpu.work(["rademacher_project"], None, 60) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"skipped   {s.name}: torch sees no CUDA device" for s in gpu.steps(["rademacher_project"], None)]
    assert "skipped   tests of rademacher_project: torch sees no CUDA device" in lines
