"""The command line: `pyattr` and `python -m pyattr`."""

from .commands import app, main

__all__ = ["app", "main"]
