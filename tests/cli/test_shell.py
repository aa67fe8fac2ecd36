"""Every failure ends in one line and the right exit status."""

import errno
import os
import signal

import pytest
import typer
from typer.testing import CliRunner

from pyattr.cli.shell import OneLineErrors, message


def application(failure):
    app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)

    @app.callback()
    def common(debug: bool = False):
        pass

    @app.command()
    def work(number: int = 0):
        if callable(failure):
            return failure()
        raise failure

    return app


def run(failure, *arguments):
    return CliRunner().invoke(application(failure), arguments or ["work"])


FULL = OSError(errno.ENOSPC, "No space left on device", "/data/x")


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (ValueError("train: steps must be at least 1, got 0"), 1, "train: steps must be at least 1, got 0"),
        (RuntimeError("two\nlines"), 1, "two lines"),
        (FULL, 1,
         "the disk is full while writing /data/x: free some space, then run the same command again to go on from here"),
        (OSError(errno.ENOSPC, "No space left on device"), 1,
         "the disk is full: free some space, then run the same command again to go on from here"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), 1, "Permission denied: /etc/x"),
        (MemoryError(), 1, "out of memory: use fewer images, or a smaller --memory, --proj-dim or --batch-size"),
        (KeyError("x"), 1, "KeyError: 'x' (a defect; `pyattr --debug ...` shows where)"),
        (RuntimeError(), 1, "RuntimeError: (a defect; `pyattr --debug ...` shows where)"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on from here"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 130, "interrupted: run the same command again to go on from here"),
        (typer.BadParameter("must be odd", param_hint="--number"), 2, "Invalid value for --number: must be odd"),
    ],
)  # fmt: skip
def test_failures_are_one_line(failure, code, line):
    result = run(failure)
    assert (result.exit_code, result.stderr, result.stdout) == (code, f"pyattr: {line}\n", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["play"], "pyattr: No such command 'play'.\n"),
        (["work", "--number", "x"], "pyattr: Invalid value for '--number': 'x' is not a valid int"),
        (["work", "--colour"], "pyattr: No such option: --colour"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, line):
    result = run(lambda: None, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(line[:30]) and result.stderr.count("\n") == 1


def test_success_and_chosen_exit_codes_pass():
    assert (run(lambda: None).exit_code, run(lambda: None).stderr) == (0, "")
    assert run(typer.Exit(7)).exit_code == 7


def test_debug_shows_the_exception_itself():
    result = run(KeyError("x"), "--debug", "work")
    assert isinstance(result.exception, KeyError)


def test_sigterm_is_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    run(lambda: None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_message_is_for_people():
    assert message(OSError("odd")) == "odd"
    assert message(OSError(errno.EDQUOT, "Quota exceeded")).startswith("the disk is full")
