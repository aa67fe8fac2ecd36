"""Stages are found by their settings, finish or stay unfinished, and add up their time."""

import errno
import json
import os
import re
import shutil

import pytest

from pyattr.cli.workspace import Workspace, WorkspaceError, megabytes


@pytest.fixture
def workspace(tmp_path):
    with Workspace(tmp_path / "out") as workspace:
        yield workspace


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_stage_is_named_by_its_settings(workspace):
    first = workspace.stage("train", {"steps": 4, "seed": 0})
    assert workspace.stage("train", {"seed": 0, "steps": 4}).folder == first.folder
    others = [
        workspace.stage("train", {"steps": 5, "seed": 0}),
        workspace.stage("train", {"steps": 4, "seed": 0, "ema": None}),
        workspace.stage("sample", {"steps": 4, "seed": 0}),
    ]
    assert len({stage.key for stage in [first, *others]}) == 4
    assert first.folder.parent == workspace.folder and not first.folder.exists()
    assert not first.finished and not first.begun


def test_another_version_of_pyattr_computes_anew(workspace, monkeypatch):
    before = workspace.stage("train", {}).key
    monkeypatch.setattr("pyattr.cli.workspace.__version__", "999.0")
    assert workspace.stage("train", {}).key != before


def test_time_adds_up_over_interruptions(workspace):
    clock, stage = Clock(), workspace.stage("train", {"steps": 4})
    with pytest.raises(KeyboardInterrupt), stage.work(clock):
        clock.now += 3
        raise KeyboardInterrupt
    assert stage.begun and not stage.finished
    assert (stage.record["seconds"], stage.record["runs"]) == (3.0, 1)
    with stage.work(clock) as notes:
        clock.now += 4
        notes["losses"] = [1.0]
        assert not stage.finished
    assert stage.finished and not stage.begun
    assert stage.record == {
        "name": "train", "settings": {"steps": 4}, "version": stage.record["version"], "finished": True,
        "seconds": 7.0, "runs": 2, "losses": [1.0],
    }  # fmt: skip


def test_the_first_failure_is_the_one_shown(workspace, monkeypatch):
    stage = workspace.stage("train", {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="the cause"), stage.work():
        monkeypatch.setattr(os, "fsync", full)
        raise ValueError("the cause")
    monkeypatch.undo()
    assert not stage.finished and os.listdir(stage.folder) == []


def test_a_stage_is_not_finished_when_that_cannot_be_written(workspace, monkeypatch):
    stage = workspace.stage("train", {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"), stage.work():
        monkeypatch.setattr(os, "fsync", full)
    assert not stage.finished


def test_existing_finds_finished_stages_only(workspace):
    stage = workspace.stage("train", {"steps": 4})
    assert workspace.existing(stage.key) is None and workspace.existing(".") is None
    with pytest.raises(ValueError), stage.work():
        raise ValueError
    assert workspace.existing(stage.key) is None
    with stage.work():
        pass
    found = workspace.existing(stage.key)
    assert (found.name, found.settings, found.key) == ("train", {"steps": 4}, stage.key)


def test_memory_outlives_the_process(tmp_path):
    with Workspace(tmp_path) as workspace:
        assert workspace.recall("train") == {}
        workspace.remember("train", {"stage": "a"})
        workspace.remember("data", {"source": "b"})
        workspace.remember("train", {"stage": "c"})
    with Workspace(tmp_path) as workspace:
        assert (workspace.recall("train"), workspace.recall("data")) == ({"stage": "c"}, {"source": "b"})


def test_one_process_at_a_time(workspace):
    line = f"{workspace.folder} is in use by another pyattr process: wait for it, or choose another folder with --out"
    with pytest.raises(WorkspaceError, match=f"^{re.escape(line)}$"):
        Workspace(workspace.folder)
    workspace.close()
    Workspace(workspace.folder).close()


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    line = f"{tmp_path}/file cannot be used (File exists): choose another output folder with --out"
    with pytest.raises(WorkspaceError, match=f"^{re.escape(line)}$"):
        Workspace(tmp_path / "file")
    line = f"{tmp_path}/file/sub cannot be used (Not a directory): choose another output folder with --out"
    with pytest.raises(WorkspaceError, match=f"^{re.escape(line)}$"):
        Workspace(tmp_path / "file/sub")


def test_too_little_room_is_said_beforehand(workspace, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 0, 5_000_000))
    workspace.need_space(5_000_000, "work")
    line = (
        f"the disk of {workspace.folder} is too full: work takes about 7 MB, 5 MB are free: "
        "free some space, or choose another folder with --out"
    )
    with pytest.raises(WorkspaceError, match=f"^{re.escape(line)}$"):
        workspace.need_space(7_000_000, "work")


def test_a_damaged_note_is_named(workspace):
    (workspace.folder / "run.json").write_text('{"train"')
    line = f"{workspace.folder}/run.json is damaged: delete it and run again"
    with pytest.raises(WorkspaceError, match=f"^{re.escape(line)}$"):
        workspace.recall("train")


def test_notes_are_plain_json(workspace):
    stage = workspace.stage("train", {"steps": 1})
    with stage.work():
        pass
    assert json.loads((stage.folder / "stage.json").read_text())["finished"] is True


@pytest.mark.parametrize(("size", "text"), [(0, "0 MB"), (34_600_000, "35 MB"), (1_230_000_000, "1.2 GB")])
def test_megabytes(size, text):
    assert megabytes(size) == text
