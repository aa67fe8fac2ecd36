"""How the command line ends: every failure in one line that says what to do, and an exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


class OneLineErrors(TyperGroup):
    """A command group whose failures are one line on stderr; `--debug` shows the traceback instead.

    Exit status: 1 the work failed, 2 the command line is wrong, 130 interrupted (SIGINT or SIGTERM).
    """

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except Exception as error:
            # Usage errors of the parser, whose class typer does not export under a stable name.
            if not hasattr(error, "format_message"):
                raise
            complain(error.format_message())
            code = MISUSED
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with _terminate_as_interrupt():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted: run the same command again to go on from here")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if hasattr(error, "format_message") or isinstance(error, (typer.Exit, typer.Abort)):
                raise
            if isinstance(error, BrokenPipeError):  # the reader of our output went away
                _discard_output()
                raise typer.Exit(FAILED) from None
            complain(message(error))
            raise typer.Exit(FAILED) from None


def complain(text: str) -> None:
    """One line on stderr."""
    print("pyattr: " + " ".join(text.split()), file=sys.stderr, flush=True)


def message(error: Exception) -> str:
    """What to tell about a failure, in one line."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}: free some space, then run the same command again to go on from here"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    if isinstance(error, MemoryError):
        return "out of memory: use fewer images, or a smaller --memory, --proj-dim or --batch-size"
    # Refusals of the library are written for people; anything else is a defect, and its kind helps to report it.
    if isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (a defect; `pyattr --debug ...` shows where)"


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that a batch system's time limit leaves whole files and a note of the time."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: whoever started the thread handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _discard_output() -> None:
    """Let the interpreter flush its standard output into nothing at exit instead of failing there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
