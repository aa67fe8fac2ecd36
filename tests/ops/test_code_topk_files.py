"""code_topk over files of codes: the same answer in bounded memory, and files that are refused."""

import os

import numpy as np
import pytest
import torch

from pyattr import testing
from pyattr.ops import code_topk

BACKENDS = [name for name in testing.usable_backends("code_topk") if testing.device_of(name) == "cpu"]
GRAM = torch.diag(torch.arange(1.0, 25.0, dtype=torch.float64) ** 1.7)


def codes_of(count):
    """[count] uint64 codes of 24 members, of any weight."""
    return np.random.default_rng(0).integers(0, (1 << 24) - 1, count, dtype=np.uint64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 9000])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_a_file_gives_what_its_array_gives(backend, count, version, tmp_path):
    codes = codes_of(count)
    with open(tmp_path / "codes.npy", "wb") as stream:
        np.lib.format.write_array(stream, codes, version)
    expected = code_topk(GRAM, codes, min(count, 30), backend=backend)
    for path in (tmp_path / "codes.npy", str(tmp_path / "codes.npy")):
        found = code_topk(GRAM, path, min(count, 30), backend=backend)
        assert isinstance(found.values, torch.Tensor)
        assert np.array_equal(found.values, expected.values) and np.array_equal(found.indices, expected.indices)


def test_an_empty_file(tmp_path):
    np.save(tmp_path / "codes.npy", codes_of(0))
    assert code_topk(GRAM, tmp_path / "codes.npy", 0).indices.shape == (0,)
    with pytest.raises(ValueError, match=r"^code_topk: k must lie in \[0, 0\], got 1$"):
        code_topk(GRAM, tmp_path / "codes.npy", 1)


def resident_without_files():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.skipif("cpu" not in BACKENDS, reason="pyattr._C is not built")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """64 MB of codes; pages of the file are the system's to drop and do not count."""
    codes = np.unique(codes_of(1 << 20))
    np.save(tmp_path / "codes.npy", np.tile(codes, 8))
    code_topk(GRAM, codes_of(1000), 10, backend="cpu")
    before = resident_without_files()
    found = code_topk(GRAM, tmp_path / "codes.npy", 16, backend="cpu")
    assert resident_without_files() - before < 20 << 20
    assert found.indices[:8].diff().tolist() == [len(codes)] * 7  # each code is there eight times


def damaged(tmp_path, change):
    path = tmp_path / "codes.npy"
    np.save(path, codes_of(100))
    content = path.read_bytes()
    path.write_bytes(change(content))
    return path


@pytest.mark.parametrize(
    ("change", "size"),
    [(lambda content: content[:-1], 927), (lambda content: content[:136], 136), (lambda content: content + b"\0", 929)],
    ids=["cut off", "one code", "longer"],
)
def test_a_file_of_another_length(tmp_path, change, size):
    path = damaged(tmp_path, change)
    with pytest.raises(ValueError) as raised:
        code_topk(GRAM, path, 1)
    assert str(raised.value) == (
        f"code_topk: codes must be a whole file: {str(path)!r} has {size} bytes, its header of 100 codes wants 928"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:40],
        lambda content: b"PK" + content[2:],
        lambda content: content[:6] + b"\7" + content[7:],
        lambda content: content[:12] + b"[" + content[13:],
    ],
    ids=["empty", "magic cut off", "header cut off", "other magic", "other version", "header is no dictionary"],
)
def test_what_is_no_npy_file(tmp_path, change):
    path = damaged(tmp_path, change)
    with pytest.raises(ValueError) as raised:
        code_topk(GRAM, path, 1)
    said = f"code_topk: codes must be a .npy file of uint64 [N], got {str(path)!r}, whose header cannot be read"
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (codes_of(4).astype(">u8"), ">u8 [4]"),
        (codes_of(4).astype(np.int64), "<i8 [4]"),
        (codes_of(4).reshape(2, 2), "<u8 [2, 2]"),
        (codes_of(4).astype(np.float64), "<f8 [4]"),
    ],
)
def test_files_of_another_kind(tmp_path, array, kind):
    path = tmp_path / "codes.npy"
    np.save(path, array)
    with pytest.raises(ValueError) as raised:
        code_topk(GRAM, path, 1)
    assert (
        str(raised.value)
        == f"code_topk: codes must be a .npy file of uint64 [N], little-endian, got {str(path)!r} of {kind}"
    )


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        code_topk(GRAM, tmp_path / "codes.npy", 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_code_in_a_file(tmp_path, backend):
    codes = codes_of(5000)
    codes[4321] = (1 << 24) - 1
    np.save(tmp_path / "codes.npy", codes)
    with pytest.raises(ValueError, match=r"got all 24 bits set at \[4321\]$"):
        code_topk(GRAM, tmp_path / "codes.npy", 1, backend=backend)
