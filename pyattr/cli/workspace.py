"""An output folder whose stages are found again: each lies in its own sub-folder, named by a hash of its settings.

A stage's settings include the keys of the stages that it builds on. A changed option therefore leads to new folders for
that stage and for those after it, and to the old ones for the rest; nothing is overwritten or deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..diffusion import DamagedFileError
from ..files import whole_file


class WorkspaceError(RuntimeError):
    """The output folder cannot be used; the message is one line and says what to do."""


class Workspace:
    """One output folder, held by one process at a time.

    Args:
        folder: made when missing.

    Raises:
        WorkspaceError: it cannot be made or written to, or another process holds it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise WorkspaceError(
                f"{self.folder} cannot be used ({error.strerror}): choose another output folder with --out"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise WorkspaceError(
                f"{self.folder} is in use by another pyattr process: wait for it, or choose another folder with --out"
            ) from error

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stage(self, name: str, settings: dict[str, Any]) -> Stage:
        """The stage of this name and these settings, wherever it stands.

        Args:
            name: the first part of its folder's name.
            settings: JSON-serialisable; must tell apart whatever leads to other results.
        """
        told = json.dumps([name, settings, __version__], sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()[:12]
        return Stage(self.folder / f"{name}-{key}", name, settings)

    def existing(self, folder: str) -> Stage | None:
        """The finished stage in a sub-folder, or None."""
        record = read_json(self.folder / folder / "stage.json")
        if record is None or not record["finished"]:
            return None
        return Stage(self.folder / folder, record["name"], record["settings"])

    def recall(self, name: str) -> dict[str, Any]:
        """What :meth:`remember` last kept under this name; empty when there is nothing."""
        return self._memory().get(name, {})

    def remember(self, name: str, value: dict[str, Any]) -> None:
        """Keep a value in `run.json`, so that a later command of the same folder knows what came before it."""
        memory = self._memory()
        if memory.get(name) != value:
            write_json(self.folder / "run.json", {**memory, name: value})

    def _memory(self) -> dict[str, Any]:
        return read_json(self.folder / "run.json") or {}

    def need_space(self, size: int, purpose: str) -> None:
        """Refuse now rather than in the middle when the disk cannot hold what is to come.

        Args:
            size: bytes.
            purpose: what they are for, in the error message.

        Raises:
            WorkspaceError: fewer bytes are free.
        """
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise WorkspaceError(
                f"the disk of {self.folder} is too full: {purpose} takes about {megabytes(size)}, "
                f"{megabytes(free)} are free: free some space, or choose another folder with --out"
            )


class Stage:
    """One step of the work: a folder, the settings that name it, and whether it is finished.

    Attributes:
        folder: its own; exists once work on it has begun.
        name, settings: see :meth:`Workspace.stage`.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]):
        self.folder, self.name, self.settings = folder, name, settings

    @property
    def key(self) -> str:
        """What tells it from others of the workspace."""
        return self.folder.name

    @property
    def record(self) -> dict[str, Any]:
        """What `stage.json` says: settings, finished, seconds, runs, and whatever the work noted."""
        return read_json(self.folder / "stage.json") or {}

    @property
    def finished(self) -> bool:
        """Whether its results are complete."""
        return self.record.get("finished", False)

    @property
    def begun(self) -> bool:
        """Whether an earlier run left part of it."""
        return not self.finished and self.folder.is_dir()

    @property
    def written(self) -> int:
        """Bytes of the files that lie in it."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @contextlib.contextmanager
    def work(self, clock: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, Any]]:
        """Do the stage inside a `with`; it is finished when the block ends without an exception.

        Time adds up over interrupted runs, as far as these could still write it down.

        Yields:
            A dict; what is put in it goes into `stage.json`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.record
        notes: dict[str, Any] = {}
        begin = clock()

        def write(finished: bool) -> None:
            seconds = before.get("seconds", 0.0) + clock() - begin
            record = {"name": self.name, "settings": self.settings, "version": __version__, "finished": finished}
            write_json(
                self.folder / "stage.json", {**record, "seconds": seconds, "runs": before.get("runs", 0) + 1, **notes}
            )

        try:
            yield notes
        except BaseException:
            with contextlib.suppress(OSError):  # the disk may be what failed, and the first error is the one to show
                write(False)
            raise
        write(True)


def read_json(path: Path) -> Any:
    """A JSON file's content, or None when there is no such file.

    Raises:
        WorkspaceError: it is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkspaceError(f"{path} is damaged: delete it and run again") from error


def check_writable(option: str, path: Path, *, folder: bool = False) -> None:
    """Refuse at the start what could not be written at the end; nothing is left behind.

    Args:
        option: that names the path.
        path: a file in a folder that is there; or a folder, which is made when missing, with those above it.
        folder: which of the two.

    Raises:
        WorkspaceError: it cannot be written; the message names the path as it was given.
    """
    home = path.absolute()
    while folder and not home.exists():
        home = home.parent
    try:
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=home if folder else home.parent):
            pass
    except OSError as error:
        wanted = (
            "folder that can be made and written to"
            if folder
            else "file in a folder that is there and can be written to"
        )
        raise WorkspaceError(f"{option} must be a {wanted}, got {path} ({error.strerror})") from error


@contextlib.contextmanager
def named_file(path: Path, wanted: str) -> Iterator[None]:
    """Inside, a file that the user named is read: should it be another than wanted, nobody is told to delete it.

    Args:
        wanted: what it must be, as the message begins.

    Raises:
        WorkspaceError: instead of a DamagedFileError; says what the file is.
    """
    try:
        yield
    except DamagedFileError as error:
        raise WorkspaceError(f"{wanted}, got {path}, which is {error.found}" if error.found else str(error)) from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as stream:
        stream.write(json.dumps(content, indent=1).encode())


def megabytes(size: int) -> str:
    """1.2 GB, 35 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
