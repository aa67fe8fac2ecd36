"""The machinery of ``make compat``, without a peer: edits that must fit, counts that must add up, no file missing."""

import ast
import dataclasses
from pathlib import Path

import pytest

from ci.compat import __main__ as command
from ci.compat import environment, sources
from ci.compat.peer import Adapted, Peer

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = "import os\n\n\ndef test_one():\n    assert os\n\n\nclass TestTwo:\n    def test_three(self):\n        pass\n"


@pytest.mark.parametrize("name", command.PEERS)
def test_every_peer_has_its_files(name):
    peer = command.describe(name)
    assert "==" in peer.distribution
    assert peer.tests
    for path in (f"pyattr/compat/{name}.py", f"tests/compat/test_{name}.py", f"tests/compat/peers/test_{name}.py"):
        assert (ROOT / path).is_file(), path
    holder = command.describe(peer.environment) if peer.environment else peer
    assert set(peer.packages) <= set(holder.packages)
    assert not peer.installed or holder.distribution == peer.distribution


def test_every_stand_in_and_every_patch_has_a_peer():
    stand_ins = {path.stem for path in (ROOT / "pyattr" / "compat").glob("[!_]*.py")}
    assert stand_ins == set(command.PEERS)
    assert {path.stem for path in sources.PATCHES.glob("*.py")} <= set(command.PEERS)


@pytest.mark.parametrize("name", command.PEERS)
def test_a_stand_in_shows_how_it_is_used(name):
    """An indented example of at least five lines in the module's docstring."""
    documentation = ast.get_docstring(ast.parse((ROOT / "pyattr" / "compat" / f"{name}.py").read_text(encoding="utf8")))
    assert sum(line.startswith("    ") for line in documentation.splitlines()) >= 5


def test_edits_are_made_in_order_at_every_occurrence():
    test = Adapted("x.py", edits=(("os", "sys"), ("import sys", "import sys as s"), ("assert sys", "assert s")))
    assert sources.edited(TEXT, test).startswith("import sys as s\n\n\ndef test_one():\n    assert s\n")


def test_an_edit_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"^tests/x.py does not contain 'cuda:0'$"):
        sources.edited(TEXT, Adapted("tests/x.py", edits=(("cuda:0", "cpu"),)))


def test_only_tests_that_are_there_are_left_out():
    kept = Adapted("x.py", left_out={"test_one": "", "TestTwo.test_three": ""})
    assert sources.edited(TEXT, kept) == TEXT
    with pytest.raises(ValueError, match=r"^x.py has no test test_three$"):
        sources.edited(TEXT, Adapted("x.py", left_out={"test_three": ""}))


def report(tmp_path, *cases):
    """A report of pytest's with (classname, child) cases."""
    inner = "".join(f'<testcase classname="{name}" name="t">{child}</testcase>' for name, child in cases)
    path = tmp_path / "report.xml"
    path.write_text(f"<testsuites><testsuite>{inner}</testsuite></testsuites>")
    return path


FILES = ["tests/test_a.py", "tests/test_ab.py"]
BOTH = [("tests.test_a", ""), ("tests.test_ab.TestX", "")]


@pytest.mark.parametrize(
    "cases, status, expected",
    [
        ([*BOTH, ("tests.test_a", "<skipped/>")], 0, (2, 0, 1, True)),
        ([*BOTH, ("tests.test_a", "<failure/>")], 1, (2, 1, 0, False)),
        ([*BOTH, ("tests.test_a", "<error/>")], 1, (2, 1, 0, False)),
        (BOTH, 2, (2, 0, 0, False)),  # pytest was interrupted
        ([BOTH[1]], 0, (1, 0, 0, False)),  # nothing of test_a
        ([BOTH[0], ("tests.test_ab", "<skipped/>")], 0, (1, 0, 1, False)),  # a file that only skips
        ([*BOTH, *2 * [("tests.test_a", "<skipped/>")]], 0, (2, 0, 2, False)),  # one more than is known
        ([], 5, (0, 0, 0, False)),
    ],
)
def test_outcomes(tmp_path, cases, status, expected):
    assert command.outcome(report(tmp_path, *cases), FILES, status, 1) == expected


def test_no_report_is_no_success(tmp_path):
    assert command.outcome(tmp_path / "none.xml", FILES, 0, 0) == (0, 0, 0, False)


def test_the_exit_status_and_the_table(monkeypatch, capsys):
    sound, broken = command.Outcome(3, 0, 1, True), command.Outcome(2, 1, 0, False)
    for theirs, status in ((sound, 0), (broken, 1)):
        monkeypatch.setattr(command, "compare", lambda name, theirs=theirs: {"ours": sound, "theirs": theirs})
        assert command.main(["trak"]) == status
        assert str(theirs) in capsys.readouterr().out
    assert str(broken) == "2 passed, 1 failed, 0 skipped  <--"


def test_a_peer_that_cannot_be_tried_stops_no_other(monkeypatch, capsys):
    def compare(name):
        if name == "fast_jl":
            raise ValueError("tests/x.py does not contain 'y'")
        return {"ours": command.Outcome(3, 0, 0, True), "theirs": command.Outcome(4, 0, 0, True)}

    monkeypatch.setattr(command, "compare", compare)
    assert command.main(["fast_jl", "trak"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "fast_jl: tests/x.py does not contain 'y'" in lines
    assert lines[-1].endswith("4 passed, 0 failed, 0 skipped")
    assert lines[-2].endswith("0 passed, 0 failed, 0 skipped  <--")


def test_an_unknown_peer(capsys):
    with pytest.raises(SystemExit):
        command.main(["nobody"])
    assert "unknown peer nobody; there are" in capsys.readouterr().err


def test_an_environment_is_made_again_unless_it_was_finished(tmp_path, monkeypatch):
    """Interrupted while the peer installs, then finished, then found complete, then wanted otherwise."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "FOLDER", tmp_path / ".venv-compat")
    (tmp_path / "pyattr").mkdir()
    peer, commands = Peer("peer==1", packages=("numpy<2",)), []

    def interrupted(command, **_):
        commands.append(command)
        if command[-1] == "peer==1":
            raise KeyboardInterrupt

    def make(folder, **_):
        site = Path(environment.sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        site.mkdir(parents=True)

    monkeypatch.setattr(environment.venv, "create", make)
    monkeypatch.setattr(environment.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.install("peer", peer)
    monkeypatch.setattr(environment.subprocess, "run", lambda command, **_: commands.append(command))
    made = []
    for wanted in (peer, peer, dataclasses.replace(peer, packages=())):
        commands.clear()
        environment.install("peer", wanted)
        made.append(len(commands))
    assert made == [2, 0, 2]
    [link] = (tmp_path / ".venv-compat" / "peer").rglob("pyattr")
    assert link.readlink() == tmp_path / "pyattr"
