"""`pyattr demo`: from real digits to a report in a few minutes on two processor cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import report
from .options import DataOptions, Machine, MethodOptions, PatchOptions, SampleOptions, ScoreOptions, TrainOptions
from .results import TOP
from .run import session
from .scoring import scoring_of
from .stages import Sampling, Training


@dataclass(frozen=True)
class Recipe:
    """The demo's settings: a budget of minutes, spent mostly on training."""

    train: TrainOptions
    sample: SampleOptions
    scores: tuple[MethodOptions, ...]
    limit: int | None = None


FULL = Recipe(
    # Far from convergence: many small steps of a high rate, and a loss that does not forget the noisy timesteps.
    TrainOptions(steps=1950, batch_size=32, learning_rate=5e-3, betas=(0.9, 0.99), ema=0.995, weighting="velocity"),
    # Ancestral sampling mends what a briefly trained network gets wrong; 50 deterministic steps do not.
    SampleOptions(num_images=8, method="ddpm", steps=1000),
    (
        ScoreOptions("dtrak", num_timesteps=4, strategy="midpoint", query_noises=32, proj_dim=1024),
        # It asks no model, so that it needs no second pass of features, which would not fit in the time.
        PatchOptions(num_timesteps=3),
    ),
)
# Every stage, at a size that takes seconds; its digits look like nothing.
QUICK = Recipe(
    TrainOptions(steps=4, batch_size=16, learning_rate=2e-3, ema=0.9),
    SampleOptions(num_images=2, steps=4),
    (
        ScoreOptions("dtrak", num_timesteps=2, proj_dim=64),
        PatchOptions(num_timesteps=1, k=10),
    ),
    limit=60,
)


def demo(out: Path, data: DataOptions, recipe: Recipe, machine: Machine) -> None:
    """Train, generate, attribute by two methods, and report.

    Args:
        out: output folder.
        data: where the training images come from.
        recipe: :data:`FULL` or :data:`QUICK`.
        machine: where to compute.
    """
    report.require()
    with session(out, machine) as work:
        images = work.load(data)
        training = Training(work.workspace, images, recipe.train)
        sampling = Sampling(work.workspace, training.stage.key, images.shape, recipe.sample)
        scorings = [scoring_of(work.workspace, training.stage.key, images, options) for options in recipe.scores]
        count = recipe.sample.num_images
        scoring_steps = [step for scoring in scorings for step in scoring.plan(sampling.stage.key, count)]
        work.plan([training, sampling, *scoring_steps])
        model = work.train(training, data)
        queries = work.generate(sampling, model)
        attributions = [work.score(scoring, model, queries) for scoring in scorings]
        work.finish(
            "Which training digits made these generated digits?"
            if data.source == "mnist_5k"
            else "Which training images made these generated images?",
            images,
            queries,
            scorings,
            attributions,
            top=TOP,
            caveats=[
                "This is a demonstration made in minutes: a small network, trained briefly, "
                "with few timesteps and a narrow projection."
            ],
        )
