"""The commands: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from .options import METHODS, DataOptions, Machine, PatchOptions, SampleOptions, ScoreOptions, TrainOptions, parse_bytes
from .shell import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Training-data attribution for diffusion models: which training images made this image, and by how much.",
)

TRAIN, SAMPLE, SCORE, PATCH = TrainOptions(), SampleOptions(), ScoreOptions(), PatchOptions()
RUN = Path("pyattr-run")
DATA_HELP = "A folder of images, an .npz file, or mnist_5k, hf:NAME[:SPLIT], torchvision:NAME."
Data = Annotated[str, typer.Option("--data", metavar="SOURCE", help=DATA_HELP)]
MaybeData = Annotated[
    str | None, typer.Option("--data", metavar="SOURCE", help=DATA_HELP + " Default: what the model was trained on.")
]
Size = Annotated[
    int | None, typer.Option(min=1, help="Resize the shorter side to this many pixels and crop the centre square.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use this many images, spread evenly through the data.")]
Root = Annotated[Path | None, typer.Option("--data-root", help="Where torchvision keeps its downloads.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder; what lies there already is used again.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU when torch sees one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads; default: all.")]
CheckpointPath = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="A model file or folder of checkpoints; default: the model in the output folder."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Equal seeds give equal results on one machine.")]


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
def info() -> None:
    """Print versions, and for every op which backends are usable or why not."""
    from .. import backends

    console = Console()
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in backends.environment().items():
        facts.add_row(name, Text(value))  # Text, since [extra] is no markup
    console.print(facts)
    table = Table("op", "backend", "state")
    for op, states in backends.report().items():
        for row, (backend, reasons) in enumerate(states.items()):
            table.add_row(
                op if row == 0 else "", backend, Text("; ".join(reasons)) if reasons else Text("usable", "green")
            )
    console.print(table)


@app.command()
def demo(
    out: Out = Path("pyattr-demo"),
    data: Data = "mnist_5k",
    size: Size = None,
    limit: Limit = None,
    data_root: Root = None,
    quick: Annotated[bool, typer.Option("--quick", help="Every stage in seconds; the images mean nothing.")] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a small diffusion model on 5,000 digits, generate, attribute, and write an HTML report."""
    from . import demo as recipes

    recipe = recipes.QUICK if quick else recipes.FULL
    chosen = _data(data, size, limit if limit is not None else recipe.limit, data_root)
    recipes.demo(out, chosen, recipe, Machine(device, threads))


@app.command()
def train(
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", show_default=False, help=DATA_HELP)] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="SOURCE", help="The same, as an option.")] = None,
    out: Out = RUN,
    size: Size = None,
    limit: Limit = None,
    data_root: Root = None,
    network: Annotated[
        str, typer.Option(help="mnist-small, cifar or celeba; any fits other sizes too.")
    ] = TRAIN.network,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = TRAIN.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = TRAIN.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Its peak, after the warmup.")] = TRAIN.learning_rate,
    betas: Annotated[tuple[float, float], typer.Option(help="AdamW's two averages' decays.")] = TRAIN.betas,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps over which it rises.")] = TRAIN.warmup,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = TRAIN.flip,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="In every residual block.")] = TRAIN.dropout,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights.")] = TRAIN.ema,
    weighting: Annotated[str, typer.Option(help="Of timesteps in the loss: simple or velocity.")] = TRAIN.weighting,
    seed: Seed = TRAIN.seed,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a diffusion model on images of one size; an interrupted training goes on where it was."""
    from . import run

    if (source is None) == (data is None):
        raise typer.BadParameter("give the training images once", param_hint="SOURCE")
    options = TrainOptions(
        network=network,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        betas=betas,
        warmup=warmup,
        flip=flip,
        dropout=dropout,
        ema=ema,
        weighting=weighting,
        seed=seed,
    )
    run.train(out, _data(source or data, size, limit, data_root), options, Machine(device, threads))


@app.command()
def generate(
    out: Out = RUN,
    checkpoint: CheckpointPath = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="How many.")] = SAMPLE.num_images,
    method: Annotated[str, typer.Option(help="ddim, ddpm or published.")] = SAMPLE.method,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = SAMPLE.steps,
    eta: Annotated[float, typer.Option(min=0, max=1, help="DDIM: 0 adds no noise, 1 as much as DDPM.")] = SAMPLE.eta,
    seed: Seed = SAMPLE.seed,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made together.")] = SAMPLE.batch_size,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Generate images from a trained model; they become the queries of `pyattr attribute`."""
    from . import run

    options = SampleOptions(
        num_images=num_images, method=method, steps=steps, eta=eta, seed=seed, batch_size=batch_size
    )
    run.generate(out, checkpoint, options, Machine(device, threads))


@app.command()
def attribute(
    out: Out = RUN,
    data: MaybeData = None,
    size: Size = None,
    limit: Limit = None,
    data_root: Root = None,
    checkpoint: CheckpointPath = None,
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Images to attribute, like --data and of the same size (--size resizes both); default: the generated ones.",
        ),
    ] = None,
    method: Annotated[
        list[str],
        typer.Option("--method", "-m", help=f"{', '.join(METHODS)}; several: the first is the main one."),
    ] = [SCORE.method],  # noqa: B006
    num_timesteps: Annotated[
        int, typer.Option(min=1, help="Timesteps that gradients average over.")
    ] = SCORE.num_timesteps,
    strategy: Annotated[str, typer.Option(help="Which timesteps: uniform, cumulative or midpoint.")] = SCORE.strategy,
    query_noises: Annotated[
        int, typer.Option(min=1, help="Noise draws for each timestep of a query; more make its scores steadier.")
    ] = SCORE.query_noises,
    projection: Annotated[
        str, typer.Option(help="Of the gradients: rademacher, gaussian, sparse or multisketch.")
    ] = SCORE.kind,
    proj_dim: Annotated[int, typer.Option(min=1, help="Numbers that each gradient is projected to.")] = SCORE.proj_dim,
    lambda_: Annotated[
        float | None, typer.Option("--lambda", help="Damping; default: chosen from the spectrum.")
    ] = None,
    seed: Seed = SCORE.seed,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images whose gradients are taken together.")
    ] = SCORE.batch_size,
    patch_timesteps: Annotated[
        int, typer.Option(min=1, help="NDA: timesteps that scores average over.")
    ] = PATCH.num_timesteps,
    patch_k: Annotated[
        int, typer.Option(min=1, help="NDA: places of a training image that count for each of a query.")
    ] = PATCH.k,
    patch_noises: Annotated[int, typer.Option(min=1, help="NDA: noise draws at each timestep.")] = PATCH.num_noises,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="For the gradients of a batch: GiB, or with a unit, as in 512MiB.")
    ] = f"{SCORE.memory >> 30}GiB",
    top: Annotated[int, typer.Option(min=1, help="Proponents and opponents shown for each query.")] = 10,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.")] = True,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Score every training image for every query; writes scores.npz and report.html."""
    from . import run

    for name in method:
        if name not in METHODS:
            raise typer.BadParameter(f"must be one of {', '.join(METHODS)}, got {name}", param_hint="--method")
    if data is None and (limit or (size and queries is None)):
        raise typer.BadParameter("--size and --limit say how to read it: give it as well", param_hint="--data")
    try:
        memory_bytes = parse_bytes(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from None
    options = [
        PatchOptions(num_timesteps=patch_timesteps, k=patch_k, num_noises=patch_noises, seed=seed)
        if name == "nda"
        else ScoreOptions(
            method=name,
            num_timesteps=num_timesteps,
            strategy=strategy,
            query_noises=query_noises,
            kind=projection,
            proj_dim=proj_dim,
            lambda_=lambda_,
            seed=seed,
            batch_size=batch_size,
            memory=memory_bytes,
        )
        for name in dict.fromkeys(method)
    ]
    run.attribute(
        out,
        None if data is None else _data(data, size, limit, data_root),
        checkpoint,
        None if queries is None else _data(queries, size, None, data_root),
        options,
        Machine(device, threads),
        top=top,
        page=page,
    )


def _data(source: str, size: int | None, limit: int | None, root: Path | None) -> DataOptions:
    return DataOptions(source, size, limit, None if root is None else str(root))


def main() -> None:
    """The console script."""
    app(prog_name="pyattr")
