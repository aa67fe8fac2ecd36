"""The command line: `pyattr` and `python -m pyattr`."""

from . import ensemble
from .commands import app, main

app.add_typer(ensemble.commands, name="ensemble")

__all__ = ["app", "main"]
