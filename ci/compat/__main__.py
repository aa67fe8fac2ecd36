"""See the package. Ends with a table, and with an error if a test failed or none ran."""

import argparse
import importlib
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from . import environment, sources
from .environment import FOLDER, ROOT
from .peer import Peer

HERE = Path(__file__).resolve().parent
PEERS = sorted(path.stem for path in (HERE / "peers").glob("*.py"))


class Outcome(NamedTuple):
    """Of one run of pytest. ``sound``: nothing failed, every file had a test that passed, and no more skipped than is known."""

    passed: int
    failed: int
    skipped: int
    sound: bool

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped" + ("" if self.sound else "  <--")


NOTHING = Outcome(0, 0, 0, False)


def describe(name: str) -> Peer:
    return importlib.import_module(f"{__package__}.peers.{name}").PEER


def run(python: Path, folder: Path, files: list[str], left_out: list[str], skipped: int, report: Path) -> Outcome:
    """pytest in the peer's environment, its output in view. Nothing is downloaded by a test."""
    command = [
        str(python), "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(folder), "--confcutdir", str(folder),
        "--junitxml", str(report), *[f"--deselect={test}" for test in left_out], *files,
    ]  # fmt: skip
    report.unlink(missing_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    status = subprocess.run(command, cwd=folder, env={**os.environ, **offline}).returncode
    return outcome(report, files, status, skipped)


def outcome(report: Path, files: list[str], status: int, skipped: int) -> Outcome:
    """The counts of pytest's report, of whose tests ``skipped`` may skip themselves."""
    if not report.exists():
        return NOTHING
    counts, passed_in = {"passed": 0, "failed": 0, "skipped": 0}, set()
    for case in ElementTree.parse(report).iter("testcase"):
        results = {child.tag for child in case}
        kind = "failed" if results & {"failure", "error"} else "skipped" if "skipped" in results else "passed"
        counts[kind] += 1
        if kind == "passed":
            passed_in.add(case.get("classname"))
    modules = {file.removesuffix(".py").replace("/", ".") for file in files}
    ran = {module for module in modules if any(f"{name}.".startswith(f"{module}.") for name in passed_in)}
    whole = counts["failed"] == 0 and counts["skipped"] <= skipped and ran == modules
    return Outcome(**counts, sound=status == 0 and whole)


def compare(name: str) -> dict[str, Outcome]:
    """Our tests with the peer, and the peer's with our stand-in."""
    peer = describe(name)
    holder = peer.environment or name
    python = environment.install(holder, describe(holder))
    environment.check(python)
    reports = FOLDER / "reports"
    reports.mkdir(exist_ok=True)
    print(f"\n=== {name}: our tests with {peer.distribution}", flush=True)
    ours = run(python, ROOT / "tests" / "compat" / "peers", [f"test_{name}.py"], [], 0, reports / f"{name}-ours.xml")
    folder = sources.adapt(name, peer)
    print(f"\n=== {name}: the tests of {peer.distribution} with pyattr.compat.{name}", flush=True)
    left_out = []
    for test in peer.tests:
        for function, reason in test.left_out.items():
            print(f"left out: {test.path} {function}: {reason}")
            left_out.append("::".join([test.path, *function.split(".")]))
    files = [test.path for test in peer.tests]
    return {"ours": ours, "theirs": run(python, folder, files, left_out, peer.skipped, reports / f"{name}-theirs.xml")}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.compat", description=sys.modules[__package__].__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}; all by default")
    chosen = parser.parse_args(arguments).peers or PEERS
    if unknown := set(chosen) - set(PEERS):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    outcomes = {}
    for name in chosen:
        try:
            outcomes[name] = compare(name)
        except (
            subprocess.CalledProcessError,
            ValueError,
        ) as error:  # of its environment or its edits; the others still run
            print(f"{name}: {error}", flush=True)
            outcomes[name] = {"ours": NOTHING, "theirs": NOTHING}
    print(f"\n{'peer':<10} {'version':<18} {'our tests with the peer':<36} the peer's tests with pyattr")
    for name, both in outcomes.items():
        print(f"{name:<10} {describe(name).distribution:<18} {both['ours']!s:<36} {both['theirs']}")
    return 0 if all(part.sound for both in outcomes.values() for part in both.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
