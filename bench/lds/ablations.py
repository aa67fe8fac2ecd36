"""What the numbers of TRAK, D-TRAK and pixel similarity depend on: one setting changed at a time, all else as in the table.

Every entry is judged at each lambda of a grid, and reported with the one that is best for other queries, two halves in turn.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyattr.attribution import DAS, QUERY_IDS, RawPixel
from pyattr.attribution.float32_kernel import Float32Kernel
from pyattr.attribution.kernel import DampedKernel
from pyattr.diffusion import features, load_model
from pyattr.diffusion.features import FeatureMap
from pyattr.diffusion.images import to_unit
from pyattr.diffusion.store import Features
from pyattr.evaluation import GroundTruth, lds, tune_on_split

from . import build
from .methods import DIM, LAMBDAS, Materials
from .problem import SCHEDULE
from .scores import parts, truth_hash

METHODS = {"TRAK": "simple", "D-TRAK": "square"}
TIMESTEPS = (1, 2, 5, 10, 20, 100)
PUBLISHED = (10, 100)  # timesteps whose features are judged in all sizes
DIMS = (32, 128, 512, DIM)  # of the same projection: a column's signs do not depend on their number
LARGE = (DIM, 32768)  # of another kind of projection, which takes less long at the published size
MEMBERS = (1, 2, 4)  # models of an ensemble
SIDES = (1, 2, 4, 8, 16)  # cells of an image each way
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FUNCTIONS = ("elbo", "avg", "l1", "l2", "linf")


@dataclass(frozen=True, eq=False)
class Variant:
    """A method with one setting changed.

    Attributes:
        method: of which it is a variant.
        settings: all that is told of it.
        grid: (lambda, scores [Q, N]) of each lambda; of a method without lambda one entry, None.
    """

    method: str
    settings: dict
    grid: Iterable[tuple[float | None, Tensor]]


def pair(
    materials: Materials, timesteps: int, loss: str, model: nn.Module | None = None, **more
) -> tuple[Features, Features]:
    """Features of the training images and of the queries, where the methods of the table find theirs."""
    own = {name: value for name, value in more.items() if name != "network"}
    feature_map = FeatureMap(SCHEDULE, loss=loss, num_timesteps=timesteps, **{"proj_dim": DIM, **own})
    folder = materials.options(timesteps, loss, **more)["directory"]
    ids = torch.arange(len(materials.queries)) + QUERY_IDS
    made = [
        features.compute(
            model or materials.model,
            images,
            feature_map,
            ids=which,
            batch_size=32,
            directory=folder / part,
            progress=materials.progress,
            stage=stage,
        )
        for images, which, part, stage in (
            (materials.images, None, "train", "features"),
            (materials.queries, ids, "queries", "query features"),
        )
    ]
    return made[0], made[1]


def grid(found: tuple[Features, Features], kernel: type[DampedKernel] = DampedKernel) -> Iterator[tuple[float, Tensor]]:
    """Scores at each lambda."""
    train, queries = found
    damped = kernel(train)
    lambdas = [float(damped.eigenvalues[0]) * value for value in LAMBDAS]
    return zip(lambdas, damped.grid(queries.tensor(), lambdas), strict=True)


def first(found: tuple[Features, Features], dim: int) -> tuple[Features, Features]:
    """The first columns."""
    some = [Features.from_tensor(part.tensor()[:, :dim].contiguous(), part.ids) for part in found]
    return some[0], some[1]


def sizes(materials: Materials) -> Iterator[Variant]:
    """Timesteps by dimensions, and the arithmetic of the published code."""
    for method, loss in METHODS.items():
        for timesteps in TIMESTEPS:
            found = pair(materials, timesteps, loss)
            for dim in DIMS if timesteps in PUBLISHED else (DIM,):
                yield Variant(method, {"timesteps": timesteps, "D": dim}, grid(first(found, dim)))
            if timesteps in PUBLISHED:
                told = {"timesteps": timesteps, "D": DIM, "solve": "float32"}
                yield Variant(method, told, grid(found, Float32Kernel))


def large(materials: Materials) -> Iterator[Variant]:
    """The published dimension, and the usual one of the same kind of projection."""
    for method, loss in METHODS.items():
        for dim in LARGE:
            found = pair(materials, 10, loss, proj_dim=dim, kind="multisketch")
            yield Variant(method, {"timesteps": 10, "D": dim, "projection": "multisketch"}, grid(found))


def ensembles(materials: Materials) -> Iterator[Variant]:
    """Models of halves of the images, one to four, as the published ensembles are; each lambda in its model's own units."""
    models = {path.stem: load_model(path).eval() for path in build.half_models(materials.problem)}
    for method, loss in METHODS.items():
        grids = [list(grid(pair(materials, 10, loss, model, network=name))) for name, model in models.items()]
        for members in MEMBERS:
            means = [
                (float(value), torch.stack([one[k][1] for one in grids[:members]]).mean(0))
                for k, value in enumerate(LAMBDAS)
            ]
            yield Variant(method, {"timesteps": 10, "D": DIM, "half models": members}, means)


def cells(materials: Materials) -> Iterator[Variant]:
    """Similarity of the means of cells of the images, and of what is left without them: where pixels know what they know."""
    train, queries = (to_unit(images, torch.empty(0)) for images in (materials.images, materials.queries))

    def means(images: Tensor, side: int) -> Tensor:
        return F.adaptive_avg_pool2d(images, side)

    def rest(images: Tensor, side: int) -> Tensor:
        return (images - F.interpolate(means(images, side), size=images.shape[-2:])) / 2  # in [-1, 1] again

    for word, view, sides in (("means of", means, SIDES), ("without means of", rest, SIDES[:-1])):
        for side in sides:
            scores = RawPixel("cosine").fit(view(train, side)).scores(view(queries, side))
            yield Variant("raw pixel, cosine", {word: f"{side} x {side} cells"}, [(None, scores)])
    nearness = -torch.cdist(queries.flatten(1), train.flatten(1))
    yield Variant("raw pixel, minus the distance", {}, [(None, nearness)])


def interpolations(materials: Materials) -> Iterator[Variant]:
    """Between TRAK and D-TRAK; features are linear in eta, so two sets give all of them."""
    simple, square = (pair(materials, 10, loss) for loss in METHODS.values())
    for eta in ETAS:
        mixed = [
            Features.from_tensor(eta * b.tensor() + (1 - eta) * (a.tensor() - b.tensor()), a.ids)
            for a, b in zip(simple, square, strict=True)
        ]
        yield Variant("D-TRAK", {"timesteps": 10, "D": DIM, "eta": eta}, grid((mixed[0], mixed[1])))


def functions(materials: Materials) -> Iterator[Variant]:
    """Other functions in place of the two."""
    for loss in FUNCTIONS:
        yield Variant("D-TRAK", {"timesteps": 10, "D": DIM, "function": loss}, grid(pair(materials, 10, loss)))


def choices(materials: Materials) -> Iterator[Variant]:
    """Which timesteps, how many draws of the noise at each, and gradients normalised."""
    changes: tuple[dict, ...] = (
        {"strategy": "cumulative"},
        {"strategy": "midpoint"},
        {"num_noises": 2},
        {"num_noises": 4},
        {"normalize": True},
    )
    for method, loss in METHODS.items():
        for change in changes:
            yield Variant(method, {"timesteps": 10, "D": DIM, **change}, grid(pair(materials, 10, loss, **change)))


def das(materials: Materials) -> Iterator[Variant]:
    """What DAS adds to normalised gradients of the prediction's mean, one at a time."""
    for change in ({}, {"squared": True}, {"residuals": True}, {"leverage": True}):
        options = {"squared": False, **materials.options(10, "avg", normalize=True), **change}
        method = DAS(materials.model, SCHEDULE, **options).fit(materials.images)
        lambdas = [float(method.eigenvalues[0]) * value for value in LAMBDAS]
        told = {"timesteps": 10, "D": DIM, **change}
        yield Variant("DAS, before its square", told, method.scores_grid(materials.queries, lambdas))


def checkpoints(materials: Materials) -> Iterator[Variant]:
    """Networks from earlier in the training."""
    for path in materials.checkpoints[:-1]:
        model, step = load_model(path).eval(), int(path.stem.removeprefix("main-"))
        for method, loss in METHODS.items():
            found = pair(materials, 10, loss, model, network=path.stem)
            yield Variant(method, {"timesteps": 10, "D": DIM, "checkpoint": step}, grid(found))


GROUPS: dict[str, Callable[[Materials], Iterator[Variant]]] = {
    function.__name__: function
    for function in (sizes, large, interpolations, functions, choices, das, checkpoints, ensembles, cells)
}


def judged(materials: Materials, group: str) -> dict:
    """LDS of the variants of a group in percent: for each kind of queries with its interval, and the curve over lambda."""
    truth = GroundTruth.open(materials.problem.folder / "evaluation.safetensors")
    results = []
    for variant in GROUPS[group](materials):
        matrices = list(variant.grid)
        told: dict = {"method": variant.method, "settings": variant.settings}
        for name, part in zip(("validation", "generated"), parts(), strict=True):
            told[name] = _judged([(value, scores[part]) for value, scores in matrices], truth, part)
        results.append(told)
    return {"truth": truth_hash(truth), "variants": results}


def _judged(matrices: list[tuple[float | None, Tensor]], truth: GroundTruth, part: slice) -> dict:
    outputs = truth.outputs()[:, part]
    if matrices[0][0] is None:
        score = lds(matrices[0][1], truth.masks, outputs)
        return {"lds": 100 * score.mean, "interval": [100 * end for end in score.interval]}
    tuned = tune_on_split(matrices, truth.masks, outputs)
    return {
        "lds": 100 * tuned.mean,
        "interval": [100 * end for end in tuned.interval],
        "lambda": [float(value) for value in tuned.chosen],
        "curve": {f"{value:.4g}": 100 * mean for value, mean in tuned.curve.items()},
        "best on the benchmark": 100 * float(np.nanmax(list(tuned.curve.values()))),
    }
