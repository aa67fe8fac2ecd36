"""The scores of every method for the queries of a problem, from the committed images, networks and retrained models."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyattr.attribution import (
    DAS,
    DTRAK,
    GAS,
    NDA,
    TRAK,
    CLIPSimilarity,
    Datamodel,
    EmpiricalInfluence,
    GradientCosine,
    GradientDot,
    JourneyTRAK,
    ProbedDAS,
    RawPixel,
    RelativeInfluence,
    RenormalizedInfluence,
    TracInCP,
)
from pyattr.diffusion import Progress, load_model
from pyattr.evaluation import GroundTruth
from pyattr.evaluation.classifier import Classifier

from . import build
from . import problem as settings
from .problem import SCHEDULE, Problem

DIM = 4096
FEW = 10  # timesteps; more of them for each of four checkpoints would cost as much as 30 models' training
PROBES = 8  # random directions of the prediction for each query
# Of the largest eigenvalue of the Gram matrix: in thirds of a power of ten.
LAMBDAS = 10.0 ** np.arange(-8, 1.01, 1 / 3)


@dataclass(frozen=True, eq=False)
class Found:
    """What a method gives.

    Attributes:
        name: for people.
        scores: [Q, N]; with the automatic lambda where there is one.
        grid: the same at each of some lambdas; None for a method without.
        signed: whether negative scores mean opponents.
        queries: rows that it can score, of validation images and then generated ones.
        settings: what else decided them.
        pool: the ground truth that they were learnt from, if any.
    """

    name: str
    scores: Tensor
    grid: Callable[[], Iterable[tuple[float, Tensor]]] | None = None
    signed: bool = True
    queries: slice = field(default_factory=lambda: slice(None))
    settings: dict = field(default_factory=dict)
    pool: GroundTruth | None = None


class Materials:
    """Images, networks and features of a problem.

    Args:
        problem: which.
        work: where features are kept.
        progress: of the features.
    """

    def __init__(self, problem: Problem, work: Path, progress: Progress):
        self.problem, self.work, self.progress = problem, work / "features", progress
        self.checkpoints = build.main_checkpoints(problem)
        self.model = load_model(self.checkpoints[-1]).eval()
        found = build.images(problem)
        self.images, self.labels = torch.from_numpy(found["train_images"]), found["train_labels"]
        self.queries = build.queries(problem)

    def options(self, timesteps: int, feature: str, **more) -> dict:
        """Of a method of gradients; methods that share all of them share their features."""
        words = [feature, str(timesteps), *(f"{name}={value}" for name, value in more.items() if name != "proj_dim")]
        return {
            "proj_dim": DIM,
            "num_timesteps": timesteps,
            "feature": feature,
            "batch_size": 32,
            "directory": self.work / f"{'-'.join(words)}-{more.get('proj_dim', DIM)}",
            "progress": self.progress,
            **more,
        }

    def damped(self, method: TRAK, name: str, queries=None, **told) -> Found:
        """The scores of a fitted method at its automatic lambda, and at the others."""
        asked = self.queries if queries is None else queries
        lambdas = [float(method.eigenvalues[0]) * value for value in LAMBDAS]
        return Found(
            name,
            method.scores(asked),
            lambda: method.scores_grid(asked, lambdas),
            signed=method.signed,
            settings={"lambda": method.lambda_, "chosen": {"lambda": "automatically"}, **told},
        )


def similarities(materials: Materials) -> Iterator[Found]:
    """Of pixels, and of a classifier's features."""
    for similarity in ("dot", "cosine"):
        for centre in (False, True):
            method = RawPixel(similarity, centre=centre).fit(materials.images)
            name = f"raw pixel, {similarity}{', centred' if centre else ''}"
            yield Found(name, method.scores(materials.queries), signed=method.signed)
    classifier = Classifier(epochs=20).fit(
        materials.images, materials.labels, path=materials.work / "classifier.safetensors", progress=materials.progress
    )
    for similarity in ("dot", "cosine"):
        method = CLIPSimilarity(classifier.extractor, similarity).fit(materials.images)
        yield Found(f"classifier features, {similarity}", method.scores(materials.queries), signed=method.signed)


def patches(materials: Materials) -> Iterator[Found]:
    """NDA as it comes."""
    method = NDA(SCHEDULE, progress=materials.progress).fit(materials.images)
    yield Found("NDA", method.scores(materials.queries), signed=method.signed)


def of_gradients(materials: Materials, timesteps: int) -> Iterator[Found]:
    """Every method of the gradients of one network; and, at the fewest timesteps, over its checkpoints."""
    told = {"timesteps": timesteps, "D": DIM}
    simple = materials.options(timesteps, "simple")
    for kind, name in ((GradientDot, "gradient dot"), (GradientCosine, "gradient cosine")):
        yield Found(
            name,
            kind(materials.model, SCHEDULE, **simple).fit(materials.images).scores(materials.queries),
            settings=told,
        )
    for kind, name in (
        (TRAK, "TRAK"),
        (RelativeInfluence, "relative influence"),
        (RenormalizedInfluence, "renormalized influence"),
    ):
        method = kind(materials.model, SCHEDULE, **simple).fit(materials.images)
        yield materials.damped(method, name, **told)
    method = DTRAK(materials.model, SCHEDULE, **materials.options(timesteps, "square")).fit(materials.images)
    yield materials.damped(method, "D-TRAK", **told)
    yield _journey(materials, timesteps)
    if timesteps > FEW:
        return
    for kind, name in ((TracInCP, "TracInCP"), (GAS, "GAS")):
        method = kind(materials.model, SCHEDULE, checkpoints=materials.checkpoints, **simple).fit(materials.images)
        yield Found(
            name, method.scores(materials.queries), settings={**told, "checkpoints": len(materials.checkpoints)}
        )


def changes(materials: Materials) -> Iterator[Found]:
    """Of how much the prediction changes, at 10 timesteps: by its mean, as published, before the square; and over all of it."""
    told = {"timesteps": 10, "D": DIM}
    mean = DAS(materials.model, SCHEDULE, squared=False, **materials.options(10, "avg", normalize=True))
    yield materials.damped(mean.fit(materials.images), "DAS, before its square", **told)
    probed = ProbedDAS(materials.model, SCHEDULE, probes=PROBES, **materials.options(10, "simple"))
    yield materials.damped(probed.fit(materials.images), "DAS, probed", **told, probes=PROBES)


def _journey(materials: Materials, timesteps: int) -> Found:
    """Of the generated queries alone."""
    samples = build.sampled(materials.problem, "trajectory", materials.progress)
    method = JourneyTRAK(materials.model, SCHEDULE, **materials.options(timesteps, "simple")).fit(materials.images)
    found = materials.damped(method, "Journey TRAK", samples, timesteps=timesteps, D=DIM)
    return Found(
        found.name,
        found.scores,
        found.grid,
        queries=slice(settings.VALIDATION, settings.VALIDATION + settings.GENERATED),
        settings=found.settings,
    )


def retrained(materials: Materials) -> Iterator[Found]:
    """Of the pool of retrained models."""
    pool = GroundTruth.open(materials.problem.folder / "retraining.safetensors")
    for kind, name in ((EmpiricalInfluence, "empirical influence"), (Datamodel, "datamodel")):
        method = kind(pool).fit(materials.images)
        yield Found(name, method.scores(materials.queries), settings={"models": len(pool.masks)}, pool=pool)
