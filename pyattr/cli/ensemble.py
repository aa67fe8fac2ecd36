"""`pyattr ensemble`: the commands of encoded ensembles; parse, call."""

from __future__ import annotations

from typing import Annotated

import typer

from .commands import DATA_HELP, RUN, SAMPLE, TRAIN, Device, Limit, Out, Root, Seed, Size, Threads, _data
from .options import CODES, EXTRACTORS, CodeOptions, EvaluateOptions, Machine, TrainOptions

commands = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Which training images made this one, by leaving them out: an ensemble whose members never saw all of them.",
)
CODE, EVALUATE = CodeOptions(), EvaluateOptions()


@commands.command()
def encode(
    source: Annotated[str, typer.Argument(metavar="SOURCE", show_default=False, help=DATA_HELP)],
    out: Out = RUN,
    size: Size = None,
    limit: Limit = None,
    data_root: Root = None,
    num_members: Annotated[
        int, typer.Option("--num-members", "-m", min=2, max=64, help="Networks to train, each on its part.")
    ] = CODE.num_members,
    codes: Annotated[
        str,
        typer.Option(
            help="items: a random code for each image; classes: for each label; walsh: Walsh codes of labels."
        ),
    ] = CODE.kind,
    weight: Annotated[
        int | None, typer.Option(min=1, help="Members that see an image, of random codes; default: half.")
    ] = CODE.weight,
    seed: Seed = CODE.seed,
) -> None:
    """Decide which member of an ensemble sees which images."""
    from . import ensemble_run

    if codes not in CODES:
        raise typer.BadParameter(f"must be one of {', '.join(CODES)}, got {codes}", param_hint="--codes")
    ensemble_run.encode(out, _data(source, size, limit, data_root), CodeOptions(num_members, codes, weight, seed))


@commands.command()
def train(
    out: Out = RUN,
    network: Annotated[
        str, typer.Option(help="mnist-small, cifar or celeba; any fits other sizes too.")
    ] = TRAIN.network,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each member.")] = TRAIN.steps,
    timesteps: Annotated[
        int, typer.Option(min=21, help="Of the diffusion; all that comes later costs in proportion to them.")
    ] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = TRAIN.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Its peak, after the warmup.")] = TRAIN.learning_rate,
    betas: Annotated[tuple[float, float], typer.Option(help="AdamW's two averages' decays.")] = TRAIN.betas,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps over which it rises.")] = TRAIN.warmup,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = TRAIN.flip,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights.")] = TRAIN.ema,
    weighting: Annotated[str, typer.Option(help="Of timesteps in the loss: simple or velocity.")] = TRAIN.weighting,
    seed: Seed = TRAIN.seed,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that train members side by side, all on the one device.")
    ] = 1,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train the members; an interrupted training goes on where it was."""
    from . import ensemble_run

    options = TrainOptions(
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
    )
    ensemble_run.train(out, options, timesteps, workers, Machine(device, threads))


@commands.command()
def sample(
    out: Out = RUN,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="How many.")] = SAMPLE.num_images,
    method: Annotated[
        str, typer.Option(help="published (that of the authors of encoded ensembles), ddpm or ddim.")
    ] = "published",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; default: all timesteps, or 50 for ddim.")
    ] = None,
    eta: Annotated[float, typer.Option(min=0, max=1, help="DDIM: 0 adds no noise, 1 as much as DDPM.")] = SAMPLE.eta,
    seed: Seed = SAMPLE.seed,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made together.")] = SAMPLE.batch_size,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Generate images from the whole ensemble, keeping every random number."""
    from . import ensemble_run

    ensemble_run.sample(out, num_images, method, steps, eta, seed, batch_size, Machine(device, threads))


@commands.command()
def ablate(
    out: Out = RUN,
    item: Annotated[
        list[str] | None, typer.Option("--item", "-i", help="A training image, by its name; several, if given again.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="A class, where classes have codes; default: all of them."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made together.")] = SAMPLE.batch_size,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Make the images again without training images or classes: exactly, and from the same noise."""
    from . import ensemble_run

    ensemble_run.ablate(out, item or [], label or [], batch_size, Machine(device, threads))


@commands.command()
def search(
    out: Out = RUN,
    top: Annotated[int, typer.Option(min=1, help="Training images found for each generated one.")] = 10,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Drop those that are in the lists of several generated images.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images whose derivatives are taken together.")] = 8,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Find the training images whose absence would change each generated image most, by the ensemble's Jacobian."""
    from . import ensemble_run

    ensemble_run.search(out, top, distinct, batch_size, Machine(device, threads))


@commands.command()
def evaluate(
    out: Out = RUN,
    items: Annotated[
        int,
        typer.Option(min=2, help="Training images, drawn at random, without which samples are made and guessed."),
    ] = EVALUATE.items,
    guesses: Annotated[
        bool,
        typer.Option("--guesses/--no-guesses", help="Whether guessed counterfactuals are compared with exact ones."),
    ] = EVALUATE.guesses,
    extractor: Annotated[
        str,
        typer.Option(
            help="classifier: of the folder's own classes; standard: LPIPS and FID by torchvision's networks."
        ),
    ] = EVALUATE.extractor,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of the classifier over the images.")] = EVALUATE.epochs,
    seed: Seed = EVALUATE.seed,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made together.")] = EVALUATE.batch_size,
    jacobian_batch_size: Annotated[
        int, typer.Option(min=1, help="Images whose derivatives are taken together.")
    ] = EVALUATE.jacobian_batch_size,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure what ablating classes does, how well ablations are guessed, and how the images settle as members are added."""
    from . import ensemble_evaluate

    if extractor not in EXTRACTORS:
        raise typer.BadParameter(f"must be one of {', '.join(EXTRACTORS)}, got {extractor}", param_hint="--extractor")
    options = EvaluateOptions(items, guesses, extractor, epochs, seed, batch_size, jacobian_batch_size)
    ensemble_evaluate.evaluate(out, options, Machine(device, threads))
