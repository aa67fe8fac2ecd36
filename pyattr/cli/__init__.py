"""The command line: `pyattr` and `python -m pyattr`."""

from . import attribute, ensemble, evaluate
from .commands import app, main

app.command()(attribute.attribute)
app.add_typer(ensemble.commands, name="ensemble")
app.add_typer(evaluate.commands, name="evaluate")

__all__ = ["app", "main"]
