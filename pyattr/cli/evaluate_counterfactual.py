"""`pyattr evaluate counterfactual`: parse, call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from .commands import RUN, Device, Out, Threads
from .options import READOUTS, Machine, readout_name, readout_word

READOUTS = READOUTS[:3]  # but for the head
FEATURES = ("classifier", "clip", "none")


@dataclass(frozen=True)
class CounterfactualOptions:
    """What is removed and measured; see :func:`pyattr.evaluation.counterfactual`.

    `methods` are names of the command line, none: all that the folder has scores of; `remove` none: a fifth of the images;
    `queries` None: all; `features` None: "classifier" where images have labels, else "none".
    """

    methods: tuple[str, ...] = ()
    readouts: tuple[str, ...] = ("signed",)
    remove: tuple[int, ...] = ()
    queries: int | None = None
    together: bool = False
    features: str | None = None
    timesteps: int = 100
    num_noises: int = 1
    epochs: int = 6
    seed: int = 0
    workers: int = 1


DEFAULT = CounterfactualOptions()


def counterfactual(
    out: Out = RUN,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Of those that `pyattr attribute` scored; several; default: all of them."),
    ] = None,
    readout: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What is removed by: {', '.join(READOUTS)} scores, of those with a sign; several; default: signed."
        ),
    ] = None,
    remove: Annotated[
        list[int] | None,
        typer.Option(
            "--remove",
            "-r",
            min=1,
            help="Training images to remove; several; default: a fifth of them.",
            metavar="COUNT",
        ),
    ] = None,
    queries: Annotated[
        int | None, typer.Option(min=1, metavar="COUNT", help="The first so many generated images; default: all.")
    ] = DEFAULT.queries,
    together: Annotated[
        bool,
        typer.Option(
            "--together", help="Remove the same images for all queries, by summed scores: one model for each method."
        ),
    ] = DEFAULT.together,
    features: Annotated[
        str | None,
        typer.Option(
            help="Whose cosine is taken: classifier (of the folder's labels), clip, or none; "
            "default: classifier where there are labels."
        ),
    ] = DEFAULT.features,
    timesteps: Annotated[int, typer.Option(min=1, help="Timesteps that losses average over.")] = DEFAULT.timesteps,
    noises: Annotated[int, typer.Option(min=1, help="Noise draws at each timestep.")] = DEFAULT.num_noises,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of the classifier over the images.")] = DEFAULT.epochs,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random control.")] = DEFAULT.seed,
    workers: Annotated[int, typer.Option(min=1, help="Models trained side by side.")] = DEFAULT.workers,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Retrain without the images that each method names, and see how much the generated images change."""
    from . import counterfactual_run

    readout = [readout_word(each) for each in readout or ()]
    for name, given, known in (("--readout", readout, READOUTS), ("--features", features and [features], FEATURES)):
        for each in given or ():
            if each not in known:
                raise typer.BadParameter(f"must be one of {', '.join(known)}, got {each}", param_hint=name)
    options = CounterfactualOptions(
        methods=tuple(dict.fromkeys(method or ())),
        readouts=tuple(dict.fromkeys(map(readout_name, readout))) or DEFAULT.readouts,
        remove=tuple(dict.fromkeys(remove or ())),
        queries=queries,
        together=together,
        features=features,
        timesteps=timesteps,
        num_noises=noises,
        epochs=epochs,
        seed=seed,
        workers=workers,
    )
    counterfactual_run.counterfactual(out, options, Machine(device, threads))
