"""The command line: `pyattr` and `python -m pyattr`."""

from . import attribute, ensemble
from .commands import app, main

app.command()(attribute.attribute)
app.add_typer(ensemble.commands, name="ensemble")

__all__ = ["app", "main"]
