"""Files are written whole or not at all."""

import errno
import os
import stat

import pytest

from pyattr.files import whole_file


def test_a_file_appears_complete_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with whole_file(path) as stream:
        stream.write(b"new ")
        assert path.read_bytes() == b"old"
        stream.write(b"text")
    assert path.read_bytes() == b"new text"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_new_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a") as stream:
            stream.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("existing", [None, b"old"])
def test_a_failure_leaves_what_was_there(tmp_path, failure, existing):
    path = tmp_path / "a"
    if existing is not None:
        path.write_bytes(existing)
    with pytest.raises(type(failure)), whole_file(path) as stream:
        stream.write(b"half of it")
        raise failure
    assert os.listdir(tmp_path) == ([] if existing is None else ["a"])
    assert existing is None or path.read_bytes() == existing


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_found_late_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"), whole_file(path) as stream:
        stream.write(b"new")
    assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == b"old"
