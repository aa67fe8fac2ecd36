"""``python -m bench.gpu [OP ...]``: build with CUDA, run the GPU tests, record the GPU benchmarks, in under nine minutes.

A call that runs out of time leaves the rest to the next: finished steps are kept in ``bench/results/<machine>/<commit>.steps``
until the sources change. Needs no network when the interpreter has the packages below, or a folder holds their wheels. What
is skipped is named with its reason. The interpreter must be one that may be installed into (a virtual environment made with
``--system-site-packages`` where it is not).
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One op, one public file: no list to keep in step.
OPS = tuple(sorted(path.stem for path in (ROOT / "pyattr" / "ops").glob("*.py") if not path.stem.startswith("_")))
# What the steps import besides torch and triton, and what builds the extension: pip installs it with --no-deps.
PACKAGES = (
    "pybind11>=2.13",
    "setuptools>=77",
    "cmake>=3.25",
    "pytest>=8",
    "pytest-benchmark",
    "hypothesis",
    "numpy",
    "scipy",
)
SOURCES = ("csrc", "pyattr", "triton_kernels", "tests/gpu", "tests/ops", "tests/conftest.py", "bench", "CMakeLists.txt",
           "setup.py", "pyproject.toml")  # fmt: skip
# The benchmark file of an op at full size, and its D.
AT_SCALE = {
    "rademacher_project": ("projection_at_scale", (4096, 32768)),
    "gaussian_project": ("projection_at_scale", (4096,)),
    "sparse_project": ("sparse_at_scale", (4096, 1 << 20)),
    "multisketch_project": ("fused_at_scale", (32768,)),
    **{
        op: ("fused_at_scale", (4096,))
        for op in ("conv2d_grad_project", "linear_grad_project", "kron_grad_project", "hadamard_project")
    },
}
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".txt", ".toml")
# Every step must fit into one call.
CALL_SECONDS = 520.0
# cuBLAS otherwise refuses torch.use_deterministic_algorithms, which the tests turn on.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: unique; how the state file and the reader know it.
        command: what runs, from the repository's root.
        seconds: about how long it takes on an H200; a call with less left does not start it.
        environment: set on top of the process's.
        skip: a reason not to run it, or "".
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""


def missing_packages() -> list[str]:
    """Requirements to install: absent, or too old."""

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version)[:2])

    found = []
    for requirement in PACKAGES:
        name, _, least = requirement.partition(">=")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "cmake" and shutil.which("cmake"):
                continue  # the system's; CMakeLists.txt refuses one that is too old
            found.append(requirement)
            continue
        if least and numbers(version) < numbers(least):
            found.append(requirement)
    return found


def architecture() -> str:
    """This GPU, as CMake names it; "all" where there is none to name."""
    if no_gpu():
        return "all"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def no_gpu() -> str:
    """Why nothing can run here, or ""."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def steps(ops: list[str], wheels: Path | None) -> list[Step]:
    """Everything for these ops, in order."""
    python, pytest = sys.executable, [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
    pip = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    found = []
    lacking = missing_packages()
    if lacking:
        source = ["--no-index", "--find-links", str(wheels)] if wheels else []
        found.append(Step("packages", [python, "-m", "pip", "install", *source, *lacking], 30))
    build = {"PYATTR_CUDA": "on", "PYATTR_CUDA_ARCHITECTURES": architecture()}
    found.append(Step("build", pip, 240, build))
    found.append(Step("GPU tests", [*pytest, "tests/gpu", "-m", "gpu"], 240))
    for op in ops:
        files = [f"tests/ops/test_{op}{part}.py" for part in ("", "_contract", "_extremes")]
        found.append(Step(f"tests of {op}", [*pytest, *(file for file in files if (ROOT / file).is_file())], 200))
        figures = [(f"benchmark {op}", op, "cuda or triton or GPU")]
        scaled, sizes = AT_SCALE.get(op, ("", ()))
        for size in sizes:
            figures.append((f"benchmark {op} at full size, D={size}", scaled, f"{op}_at_scale_{size}"))
        for name, file, expression in figures:
            found.append(Step(name, [python, "-m", "bench.gpu", "--record", file, expression], 200))
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck", "initcheck"):
        watched = [python, "tests/gpu/sanitized_projection.py"]
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *watched]
        reason = "" if sanitizer else "no compute-sanitizer on PATH"
        found.append(Step(f"compute-sanitizer {tool}", command, 200, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, reason))
    return found


def digest() -> str:
    """Of the sources: a step done on others is not done."""
    found = hashlib.sha256()
    for source in SOURCES:
        inside = (ROOT / source).rglob("*") if (ROOT / source).is_dir() else [ROOT / source]
        for path in sorted(inside):
            if path.is_file() and path.suffix in SUFFIXES:
                found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def state_path() -> Path:
    """Beside the recorded run; the suffix keeps it from being taken for one."""
    from . import machine, tables

    description = machine.describe()
    return tables.RESULTS / description["slug"] / f"{description['commit']}.steps"


def run(step: Step, seconds: float) -> dict:
    """Do a step; what to remember of it."""
    if step.skip:
        return {"state": "skipped", "reason": step.skip}
    print(f"bench.gpu: {step.name}: {' '.join(step.command)}", flush=True)
    started = time.monotonic()
    environment = {**os.environ, **ENVIRONMENT, **step.environment}
    # A session of its own, so that a step that takes too long goes with everything it started.
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"state": "too slow", "reason": f"stopped after {seconds:.0f} s"}
    took = round(time.monotonic() - started, 1)
    return {"state": "done", "seconds": took} if status == 0 else {"state": "failed", "reason": f"status {status}"}


def record(name: str, expression: str) -> None:
    """Run one benchmark file's figures that match, and record them."""
    from . import __main__ as bench

    done = bench.run([name], with_peers=False, options=("-k", expression))
    print(f"recorded in {bench.record(done, filtered=True).relative_to(ROOT)}")
    bench.print_goals(done)


def work(ops: list[str], wheels: Path | None, seconds: float) -> int:
    """Do what is left of the steps within the time; the process's status."""
    reason = no_gpu()
    if reason:
        for step in steps(ops, wheels):
            print(f"skipped   {step.name}: {reason}")
        return 0
    started = time.monotonic()
    todo = steps(ops, wheels)
    outcomes: dict[str, dict] = {}
    path, sources = None, digest()
    for step in todo:
        if path is None and step.name not in ("packages", "build"):
            path = state_path()  # its name needs the built extension
            kept = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
            outcomes = (kept["steps"] if kept.get("sources") == sources else {}) | outcomes
        if outcomes.get(step.name, {}).get("state") == "done":
            continue
        left = seconds - (time.monotonic() - started)
        if left < step.seconds:
            outcomes[step.name] = {"state": "left", "reason": f"{left:.0f} s were left, it needs {step.seconds:.0f}"}
            continue
        outcomes[step.name] = run(step, left)
        if path is not None:
            from . import figures

            figures.write_json(path, {"sources": sources, "steps": outcomes})
        if step.name in ("packages", "build") and outcomes[step.name]["state"] != "done":
            break  # nothing else can run
    unreached = {"state": "left", "reason": "an earlier step did not end well"}
    ends = {step.name: outcomes.get(step.name, unreached) for step in todo}
    for name, outcome in ends.items():
        print(f"{outcome['state']:9} {name}{': ' + outcome['reason'] if 'reason' in outcome else ''}")
    return int(any(outcome["state"] in ("failed", "too slow") for outcome in ends.values()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"one of {', '.join(OPS)}; all when none is given")
    parser.add_argument("--wheels", type=Path, help="folder with the wheels of packages that are missing")
    parser.add_argument(
        "--seconds", type=float, default=CALL_SECONDS, help=f"length of this call (default {CALL_SECONDS:.0f})"
    )
    parser.add_argument("--record", nargs=2, metavar=("FILE", "EXPRESSION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        record(*arguments.record)
        return
    unknown = [op for op in arguments.ops if op not in OPS]
    if unknown:
        parser.error(f"OP must be one of {', '.join(OPS)}, got {', '.join(unknown)}")
    if arguments.wheels and not arguments.wheels.is_dir():
        parser.error(f"--wheels must be a folder, got {arguments.wheels}")
    sys.exit(work(arguments.ops or list(OPS), arguments.wheels, arguments.seconds))


if __name__ == "__main__":
    main()
