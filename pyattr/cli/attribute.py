"""`pyattr attribute`: parse, refuse what does not go together, call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import DATA_HELP, RUN, Device, Limit, Out, Root, Seed, Size, Threads, _data
from .options import (
    AVERAGED,
    FEATURES,
    GOES_WITH,
    GRADIENTS,
    LATENT,
    MAGIC_CHECKPOINTING,
    MAGIC_DIVERGENCES,
    MAGIC_NETWORKS,
    MAGIC_PHI_OF,
    MAGIC_PHIS,
    METHODS,
    READOUTS,
    RETRAINING,
    SIMILARITIES,
    SOLVES,
    SQUARES,
    EncoderOptions,
    LatentOptions,
    Machine,
    MagicOptions,
    MethodOptions,
    PatchOptions,
    PixelOptions,
    PoolOptions,
    ReadoutOptions,
    ScoreOptions,
    parse_bytes,
    parse_lambda,
    readout_name,
    readout_word,
)

SCORE, PATCH, PIXEL, ENCODER, MAGIC = ScoreOptions(), PatchOptions(), PixelOptions(), EncoderOptions(), MagicOptions()


def attribute(
    context: typer.Context,
    out: Out = RUN,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help=DATA_HELP + " Default: what the model was trained on."),
    ] = None,
    size: Size = None,
    limit: Limit = None,
    data_root: Root = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint",
            help="A model file or folder of checkpoints; several: their scores' mean; default: the output folder's model.",
        ),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="A Stable Diffusion pipeline as diffusers saves it; with --lora and --prompts."
        ),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Its LoRA weights, whose model is asked; several: the mean of the scores."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON with the prompt of each class, or each image, by its name."),
    ] = None,
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
    readout: Annotated[
        str | None,
        typer.Option(
            help=f"What is read out of the scores: {', '.join(READOUTS)}; default: squared for {' and '.join(SQUARES)}, which "
            "are squares, else signed."
        ),
    ] = None,
    percent: Annotated[
        float | None, typer.Option(help="Of the training images, those whose scores --readout head keeps.")
    ] = None,
    num_timesteps: Annotated[
        int, typer.Option(min=1, help="Timesteps that gradients average over.")
    ] = SCORE.num_timesteps,
    strategy: Annotated[str, typer.Option(help="Which timesteps: uniform, cumulative or midpoint.")] = SCORE.strategy,
    feature: Annotated[
        str | None,
        typer.Option(
            help=f"What gradients are of: {', '.join(FEATURES)}; default: square for dtrak, avg for das, else simple, the loss."
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Of --feature interpolate, from half the loss (0.5) to square (1).")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Divide the gradient at each timestep by its norm, which costs each twice; default: das alone does.",
        ),
    ] = SCORE.normalize,
    num_noises: Annotated[int, typer.Option(min=1, help="Noise draws for each timestep.")] = SCORE.num_noises,
    query_noises: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Noise draws for each timestep of a query; more make its scores steadier. Default: --num-noises.",
        ),
    ] = None,
    projection: Annotated[
        str, typer.Option(help="Of the gradients: rademacher, gaussian, sparse or multisketch.")
    ] = SCORE.kind,
    proj_dim: Annotated[int, typer.Option(min=1, help="Numbers that each gradient is projected to.")] = SCORE.proj_dim,
    lambda_: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            metavar="NUMBERS",
            help="Damping, or several with commas between, to choose from; default: chosen from the spectrum.",
        ),
    ] = None,
    residuals: Annotated[
        bool, typer.Option("--residuals", help="das: weigh training images by the model's error on them.")
    ] = SCORE.residuals,
    solve_dtype: Annotated[
        str,
        typer.Option(
            "--solve-dtype",
            help="Of the damped inverse: float64, or float32 as the published code has it, noise at small lambda.",
        ),
    ] = SCORE.solve_dtype,
    probes: Annotated[
        int, typer.Option(min=1, help="probed-das: random directions of a query's prediction.")
    ] = SCORE.probes,
    train_probes: Annotated[
        int, typer.Option(min=1, help="probed-das: of a training image's, for the curvature.")
    ] = SCORE.train_probes,
    leverage: Annotated[
        bool, typer.Option("--leverage", help="das: weigh training images by what they have to themselves.")
    ] = SCORE.leverage,
    checkpoints: Annotated[
        int | None,
        typer.Option(
            min=2, help="tracincp, gas: how many of the training's, evenly spaced; default: all that were kept."
        ),
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
    similarity: Annotated[
        str, typer.Option(help="pixels, clip-similarity: cosine or dot, the inner product.")
    ] = PIXEL.similarity,
    centre: Annotated[
        bool, typer.Option("--centre/--no-centre", help="pixels: take the mean training image off first.")
    ] = PIXEL.centre,
    clip: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="clip-similarity: transformers' CLIPModel; default: a classifier of the labels in its place.",
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="clip-similarity without --clip: passes of the classifier over the images.")
    ] = ENCODER.epochs,
    pool: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="empirical-influence, datamodel: losses of models trained on subsets."),
    ] = None,
    target: Annotated[str, typer.Option(help="empirical-influence, datamodel: which loss of the pool.")] = "simple",
    magic_network: Annotated[
        str, typer.Option(help=f"magic trains one of {', '.join(MAGIC_NETWORKS)}; score-net takes grey 28 x 28 images.")
    ] = MAGIC.network,
    magic_steps: Annotated[int, typer.Option(min=1, help="magic: steps of its training.")] = MAGIC.steps,
    magic_batch_size: Annotated[int, typer.Option(min=1, help="magic: images in a step.")] = MAGIC.train_batch_size,
    magic_learning_rate: Annotated[
        float, typer.Option(help="magic: its peak, after a warmup over a tenth of the steps; then a cosine.")
    ] = MAGIC.learning_rate,
    magic_eps_root: Annotated[
        float, typer.Option(help="magic: what Adam adds under its root; more makes training smoother.")
    ] = MAGIC.eps_root,
    magic_phi: Annotated[
        str, typer.Option(help="magic: what is differentiated: loss, or likelihood (of score-net).")
    ] = MAGIC.phi,
    magic_draws: Annotated[
        int, typer.Option(min=1, help="magic: draws of time and noise that the loss of a query averages over.")
    ] = MAGIC.draws,
    magic_divergence: Annotated[
        str, typer.Option(help="magic: the likelihood's, hutchinson along random directions, or exact.")
    ] = MAGIC.divergence,
    magic_probes: Annotated[int, typer.Option(min=1, help="magic: how many directions.")] = MAGIC.probes,
    magic_solver_steps: Annotated[
        int, typer.Option(min=1, help="magic: Runge-Kutta steps from an image to noise, for the likelihood.")
    ] = MAGIC.solver_steps,
    magic_checkpointing: Annotated[
        str, typer.Option(help=f"magic: which states are kept: {', '.join(MAGIC_CHECKPOINTING)}; moves no score.")
    ] = MAGIC.checkpointing,
    check_smoothness: Annotated[
        bool,
        typer.Option(
            "--check-smoothness", help="magic: measure by three more trainings how far scores can be trusted."
        ),
    ] = MAGIC.check_smoothness,
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="For the gradients of a batch, or magic's states: GiB, or with a unit, as in 512MiB."
        ),
    ] = f"{SCORE.memory >> 30}GiB",
    top: Annotated[int, typer.Option(min=1, help="Proponents and opponents shown for each query.")] = 10,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.")] = True,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Score every training image for every query; writes scores.npz and report.html."""
    from . import run

    for name in method:
        _one_of("--method", name, METHODS)
    method = list(dict.fromkeys(method))
    _check_options_of(method, context)
    if data is None and (limit or (size and queries is None)):
        raise typer.BadParameter("--size and --limit say how to read it: give it as well", param_hint="--data")
    if readout is not None:
        readout = readout_word(readout)
        _one_of("--readout", readout, READOUTS)
    _check_together("--percent", percent, "--readout head", readout == "head")
    if feature is not None:
        _one_of("--feature", feature, FEATURES)
    _check_together("--eta", eta, "--feature interpolate", feature == "interpolate")
    if feature is not None and {"trak", "dtrak"} <= set(method):
        raise typer.BadParameter(
            "it is all that tells trak from dtrak: with it give one of them, got both", param_hint="--feature"
        )
    _one_of("--similarity", similarity, SIMILARITIES)
    _one_of("--solve-dtype", solve_dtype, SOLVES)
    _check_magic(context, magic_network, magic_phi, magic_divergence, magic_checkpointing)
    _check_models(method, checkpoint, pipeline, lora, prompts, data, queries)
    asking = [name for name in method if name in RETRAINING]
    if asking and pool is None:
        raise typer.BadParameter(f"must be a file for {', '.join(asking)}, got none", param_hint="--pool")
    memory_bytes = _parsed("--memory", memory, parse_bytes)
    lambdas = None if lambda_ is None else _parsed("--lambda", lambda_, parse_lambda)

    def options(name: str) -> MethodOptions:
        if name == "nda":
            return PatchOptions(num_timesteps=patch_timesteps, k=patch_k, num_noises=patch_noises, seed=seed)
        if name == "pixels":
            return PixelOptions(similarity=similarity, centre=centre)
        if name == "clip-similarity":
            return EncoderOptions(similarity=similarity, clip=None if clip is None else str(clip), epochs=epochs)
        if name in RETRAINING:
            return PoolOptions(name, str(pool), target)
        if name == "magic":
            return MagicOptions(
                network=magic_network,
                steps=magic_steps,
                train_batch_size=magic_batch_size,
                learning_rate=magic_learning_rate,
                eps_root=magic_eps_root,
                phi=magic_phi,
                draws=magic_draws,
                divergence=magic_divergence,
                probes=magic_probes,
                solver_steps=magic_solver_steps,
                checkpointing=magic_checkpointing,
                memory=memory_bytes,
                check_smoothness=check_smoothness,
                seed=seed,
            )
        return ScoreOptions(
            method=name,
            num_timesteps=num_timesteps,
            strategy=strategy,
            feature=feature,
            eta=eta,
            normalize=normalize,
            num_noises=num_noises,
            query_noises=num_noises if query_noises is None else query_noises,
            kind=projection,
            proj_dim=proj_dim,
            lambda_=lambdas,
            residuals=residuals,
            leverage=leverage,
            checkpoints=checkpoints,
            solve_dtype=solve_dtype,
            probes=probes,
            train_probes=train_probes,
            seed=seed,
            batch_size=batch_size,
            memory=memory_bytes,
        )

    run.attribute(
        out,
        None if data is None else _data(data, size, limit, data_root),
        tuple(checkpoint or ()) if pipeline is None else _latents(pipeline, lora, prompts),
        None if queries is None else _data(queries, size, None, data_root),
        [options(name) for name in method],
        None if readout is None else ReadoutOptions(readout_name(readout), percent),
        Machine(device, threads),
        top=top,
        page=page,
    )


def _check_options_of(methods: list[str], context: typer.Context) -> None:
    """Refuse an option that none of the methods has.

    Raises:
        BadParameter: the message says which methods have it.
    """
    given = _given(context)
    for option, having in GOES_WITH.items():
        if option in given and not set(having) & set(methods):
            raise typer.BadParameter(f"goes with {', '.join(having)}, got {', '.join(methods)}", param_hint=option)


def _given(context: typer.Context) -> set[str]:
    """The options that stand on the command line."""
    sources = {each.opts[0]: context.get_parameter_source(each.name) for each in context.command.params}
    return {option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _check_magic(context: typer.Context, network: str, phi: str, divergence: str, checkpointing: str) -> None:
    """Refuse a choice that there is not, and an option of another choice than the one that was made.

    Raises:
        BadParameter: the message says what it goes with.
    """
    _one_of("--magic-network", network, MAGIC_NETWORKS)
    _one_of("--magic-phi", phi, MAGIC_PHIS)
    _one_of("--magic-divergence", divergence, MAGIC_DIVERGENCES)
    _one_of("--magic-checkpointing", checkpointing, MAGIC_CHECKPOINTING)
    if phi == "likelihood" and network != "score-net":
        raise typer.BadParameter(
            f"likelihood goes with --magic-network score-net, got {network}", param_hint="--magic-phi"
        )
    given = _given(context)
    for option, of in MAGIC_PHI_OF.items():
        if option in given and phi != of:
            raise typer.BadParameter(f"goes with --magic-phi {of}, got {phi}", param_hint=option)
    if "--magic-probes" in given and divergence != "hutchinson":
        raise typer.BadParameter(
            f"goes with --magic-divergence hutchinson, got {divergence}", param_hint="--magic-probes"
        )


def _check_models(
    methods: list[str],
    checkpoints: list[Path] | None,
    pipeline: Path | None,
    loras: list[Path] | None,
    prompts: Path | None,
    data: str | None,
    queries: str | None,
) -> None:
    """Refuse several models for a method that takes one, and half of what a model of latents needs.

    Raises:
        BadParameter: the message says what is missing.
    """
    for option, given in (("--checkpoint", checkpoints), ("--lora", loras)):
        alone = [name for name in methods if name in GRADIENTS and name not in AVERAGED]
        if given is not None and len(given) > 1 and alone:
            raise typer.BadParameter(
                f"several go with {', '.join(AVERAGED)}, got {', '.join(alone)}", param_hint=option
            )
    needed = {"--pipeline": pipeline, "--lora": loras, "--prompts": prompts}
    there = [option for option, given in needed.items() if given]
    if there and len(there) < len(needed):
        lacking = next(option for option in needed if option not in there)
        raise typer.BadParameter(
            f"goes with {', '.join(needed)} together, got {', '.join(there)} alone", param_hint=lacking
        )
    if not there:
        return
    if checkpoints:
        raise typer.BadParameter("goes without --pipeline, whose model is another, got both", param_hint="--checkpoint")
    for option, given in (("--data", data), ("--queries", queries)):
        if given is None:
            raise typer.BadParameter("must be given with --pipeline, got none", param_hint=option)
    others = [name for name in methods if name not in LATENT]
    if others:
        raise typer.BadParameter(f"goes with {', '.join(LATENT)}, got {', '.join(others)}", param_hint="--pipeline")


def _latents(pipeline: Path, loras: list[Path], prompts: Path) -> LatentOptions:
    return LatentOptions(str(pipeline), tuple(map(str, loras)), str(prompts))


def _check_together(option: str, value: float | None, companion: str, companion_given: bool) -> None:
    """Refuse a number without the choice that it belongs to, and the choice without the number."""
    if companion_given != (value is not None):
        got = f"{companion} alone" if value is None else f"{value:g} alone"
        raise typer.BadParameter(f"goes with {companion}, got {got}", param_hint=option)


def _one_of(option: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"must be one of {', '.join(choices)}, got {value}", param_hint=option)


def _parsed(option: str, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
