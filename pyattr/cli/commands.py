"""The commands: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from .options import DataOptions, KeepOptions, Machine, SampleOptions, TrainOptions
from .shell import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Training-data attribution for diffusion models: which training images made this image, and by how much.",
)

TRAIN, KEEP, SAMPLE = TrainOptions(), KeepOptions(), SampleOptions()
RUN = Path("pyattr-run")
DATA_HELP = "A folder of images, an .npz file, or mnist_5k, hf:NAME[:SPLIT], torchvision:NAME."
Data = Annotated[str, typer.Option("--data", metavar="SOURCE", help=DATA_HELP)]
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
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; default: a twentieth of all.")
    ] = KEEP.every,
    keep_checkpoints: Annotated[
        int, typer.Option(min=1, help="How many of the newest stay, for methods that follow the training.")
    ] = KEEP.count,
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
    keep = KeepOptions(checkpoint_every, keep_checkpoints)
    run.train(out, _data(source or data, size, limit, data_root), options, keep, Machine(device, threads))


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
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Keep the image after each step too, for journey-trak.")
    ] = SAMPLE.trajectory,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Generate images from a trained model; they become the queries of `pyattr attribute`."""
    from . import run

    options = SampleOptions(
        num_images=num_images,
        method=method,
        steps=steps,
        eta=eta,
        seed=seed,
        batch_size=batch_size,
        trajectory=trajectory,
    )
    run.generate(out, checkpoint, options, Machine(device, threads))


def _data(source: str, size: int | None, limit: int | None, root: Path | None) -> DataOptions:
    return DataOptions(source, size, limit, None if root is None else str(root))


def main() -> None:
    """The console script."""
    app(prog_name="pyattr")
