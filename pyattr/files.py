"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
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
