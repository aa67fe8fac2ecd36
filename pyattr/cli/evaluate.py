"""`pyattr evaluate`: the commands that judge attribution scores."""

from __future__ import annotations

import typer

from .evaluate_counterfactual import counterfactual
from .evaluate_lds import lds

commands = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="How well scores say what training without some images would have done.",
)
commands.command()(counterfactual)
commands.add_typer(lds, name="lds")
