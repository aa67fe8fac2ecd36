"""Files that are written whole or not at all, and what other files are."""

import contextlib
import os
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears complete and on disk, or stays as it was.

    The bytes go to a temporary file beside `path`, which replaces it after fsync; any exception removes the
    temporary file. Only a killed process can leave one behind (`.NAME.*.part`), and readers never look at it.

    Args:
        path: the file to write; its folder must exist.

    Yields:
        A binary file object.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# first bytes -> what a file of them is
_KINDS = {
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"\x80": "a pickle",
}


def file_kind(path: str | os.PathLike) -> str | None:
    """What a file is by its first bytes, in words, for a message about one that should be another; None: not known.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        start = stream.read(4096)
    # The length of the header comes first, of eight bytes, and the header is JSON.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "a safetensors file"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        return "an .npz archive" if names and all(name.endswith(".npy") for name in names) else "a zip archive"
    if start.lstrip()[:1] in (b"{", b"[") and b"\0" not in start:
        return "a JSON file"
    return next((kind for first, kind in _KINDS.items() if start.startswith(first)), None)
