"""Files are written whole or not at all."""

import errno
import os
import stat
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from pyattr.files import file_kind, whole_file


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


def test_what_a_file_is(tmp_path):
    np.savez(tmp_path / "npz", x=np.zeros(2))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("data.pkl", b"x")
        archive.writestr("x.npy", b"x")
    np.save(tmp_path / "npy.npy", np.zeros(2))
    Image.new("L", (2, 2)).save(tmp_path / "png", "PNG")
    Image.new("L", (2, 2)).save(tmp_path / "jpeg", "JPEG")
    safetensors.numpy.save_file({"x": np.zeros(2)}, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:20])
    (tmp_path / "object").write_text(' {"a": 1}')
    (tmp_path / "list").write_text("[1, 2, 3, {}]")
    for name in ("empty", "text"):
        (tmp_path / name).write_text("" if name == "empty" else "hello, hello")
    assert {path.name: file_kind(path) for path in tmp_path.iterdir()} == {
        "npz.npz": "an .npz archive",
        "zip": "a zip archive",
        "npy.npy": "a NumPy array",
        "png": "a PNG image",
        "jpeg": "a JPEG image",
        "whole": "a safetensors file",
        "cut": "a safetensors file",
        "object": "a JSON file",
        "list": "a JSON file",
        "empty": None,
        "text": None,
    }
