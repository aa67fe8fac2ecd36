"""`pyattr evaluate lds`: parse, call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .commands import DATA_HELP, TRAIN, Device, Limit, Root, Seed, Size, Threads, _data
from .options import READOUTS, Machine, TrainOptions, readout_name, readout_word

PERCENT = 5.0  # of the images in the head
POOLS = ("evaluation", "retraining")
TABLE = "table"


class _TableUnlessNamed(TyperGroup):
    """`lds FOLDER` means `lds table FOLDER`; a folder that is called as a command is given as ./build."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *self.get_help_option_names(ctx)):
            args = [TABLE, *args]
        return super().parse_args(ctx, args)


lds = typer.Typer(
    cls=_TableUnlessNamed,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The linear datamodeling score: do scores predict the losses of models trained on other subsets? "
    "`pyattr evaluate lds FOLDER` is short for `pyattr evaluate lds table FOLDER`.",
)


@lds.command(TABLE)
def table(
    places: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER | SCORES...",
            show_default=False,
            help="A folder with evaluation.safetensors and scores/, or files of scores together with --truth.",
        ),
    ] = None,
    truth: Annotated[Path | None, typer.Option(help="A ground truth file, for files of scores.")] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="JSON with ranges of queries by name; default: queries.json in the folder, else all in one."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="Of the losses that the ground truth has (of `lds build`: simple, elbo, square, l1, linf); several: a table "
            "each; default: simple, or the first there is.",
        ),
    ] = None,
    readout: Annotated[
        list[str] | None,
        typer.Option(
            "--readout",
            "-r",
            help=f"Of scores that have a sign: {', '.join(READOUTS)}; several: columns side by side; default: signed.",
        ),
    ] = None,
    percent: Annotated[
        float | None,
        typer.Option(help=f"Of the training images, those that --readout head keeps; default: {PERCENT:g}."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Differences from this method, or file of scores; default: from the best."),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="SETTING",
            help="Choose the value of this setting for each group, on one half of its queries for the other.",
        ),
    ] = None,
    tune_on_benchmark: Annotated[
        bool, typer.Option("--tune-on-benchmark", help="Choose it by the reported numbers, as published tables do.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all numbers to it.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write pictures of each target into it.")] = None,
    threads: Threads = None,
) -> None:
    """Print the linear datamodeling score of each method, with intervals and paired differences."""
    from . import lds_table

    readout = [readout_word(each) for each in readout or ()]
    for each in readout:
        if each not in READOUTS:
            raise typer.BadParameter(f"must be one of {', '.join(READOUTS)}, got {each}", param_hint="--readout")
    if percent is not None and "head" not in readout:
        raise typer.BadParameter(f"goes with --readout head, got {percent:g} alone", param_hint="--percent")
    if tune_on_benchmark and tune is None:
        raise typer.BadParameter("say which setting is chosen: give --tune", param_hint="--tune-on-benchmark")
    lds_table.table(
        lds_table.found(places or [], truth, queries),
        lds_table.Asked(
            targets=tuple(dict.fromkeys(target or ())),
            readouts=tuple(dict.fromkeys(map(readout_name, readout))) or ("signed",),
            percent=PERCENT if percent is None else percent,
            against=against,
            tune=tune,
            on_benchmark=tune_on_benchmark,
            json=json,
            plots=plots,
        ),
        threads,
    )


@lds.command()
def build(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", show_default=False, help="Output folder; what lies there is used again.")
    ],
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", show_default=False, help="Training images. " + DATA_HELP)
    ],
    queries: Annotated[
        list[str],
        typer.Option(
            "--queries",
            metavar="[NAME=]SOURCE",
            show_default=False,
            help="Images whose losses are taken, like --data; several, each with a name of its own.",
        ),
    ],
    size: Size = None,
    limit: Limit = None,
    data_root: Root = None,
    subsets: Annotated[int, typer.Option("--subsets", "-m", min=3, help="Random halves of the images; may grow.")] = 48,
    seeds: Annotated[int, typer.Option(min=1, max=99, help="Models of each subset; may grow.")] = 2,
    fraction: Annotated[float, typer.Option(help="Of the images in a subset.")] = 0.5,
    pool: Annotated[
        str, typer.Option(help="evaluation, or retraining: another draw, for methods that learn from retrained models.")
    ] = "evaluation",
    timesteps: Annotated[int, typer.Option(min=1, max=1000, help="Evenly spaced ones that losses average over.")] = 100,
    noises: Annotated[int, typer.Option(min=1, help="Noise draws at each timestep.")] = 1,
    network: Annotated[
        str, typer.Option(help="mnist-small, cifar or celeba; any fits other sizes too.")
    ] = TRAIN.network,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each model.")] = TRAIN.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = TRAIN.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Its peak, after the warmup.")] = TRAIN.learning_rate,
    betas: Annotated[tuple[float, float], typer.Option(help="AdamW's two averages' decays.")] = TRAIN.betas,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps over which it rises.")] = TRAIN.warmup,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = TRAIN.flip,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights.")] = TRAIN.ema,
    weighting: Annotated[str, typer.Option(help="Of timesteps in the loss: simple or velocity.")] = TRAIN.weighting,
    seed: Seed = TRAIN.seed,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train side by side, on the one device.")] = 1,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Make ground truth: train models on random subsets and take the queries' losses; goes on where it was interrupted."""
    from . import ground_truth

    if pool not in POOLS:
        raise typer.BadParameter(f"must be one of {', '.join(POOLS)}, got {pool}", param_hint="--pool")
    named: dict[str, Any] = {}
    for each in queries:
        name, _, source = each.rpartition("=")
        name = name or "queries"
        if name == "train" or not name.replace("-", "").replace("_", "").isalnum():
            raise typer.BadParameter(
                f"a name is of letters, digits, - and _, and not train, got {name}", param_hint="--queries"
            )
        if name in named:
            raise typer.BadParameter(
                f"each needs a name of its own, as in validation=SOURCE, got {name} twice", param_hint="--queries"
            )
        named[name] = _data(source, size, None, data_root)
    ground_truth.build(
        out,
        _data(data, size, limit, data_root),
        named,
        ground_truth.GroundTruthOptions(subsets, seeds, fraction, pool, timesteps, noises, workers),
        TrainOptions(
            network=network,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            betas=betas,
            warmup=warmup,
            flip=flip,
            ema=ema,
            weighting=weighting,
            seed=seed,
        ),
        Machine(device, threads),
    )
