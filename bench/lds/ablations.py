"""What the numbers of TRAK and D-TRAK depend on: one setting changed at a time, all else as in the table.

Every entry is judged at each lambda of a grid, and reported with the one that is best for other queries, two halves in turn.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pyattr.attribution import QUERY_IDS
from pyattr.attribution.float32_kernel import Float32Kernel
from pyattr.attribution.kernel import DampedKernel
from pyattr.diffusion import features, load_model
from pyattr.diffusion.features import FeatureMap
from pyattr.diffusion.store import Features
from pyattr.evaluation import GroundTruth, tune_on_split

from .methods import DIM, LAMBDAS, Materials
from .problem import SCHEDULE
from .scores import parts

METHODS = {"TRAK": "simple", "D-TRAK": "square"}
DIMS = (512, DIM)  # of the same projection: a column's signs do not depend on their number
LARGE = 32768
TIMESTEPS = (10, 100)
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FUNCTIONS = ("elbo", "avg", "l1", "l2", "linf")


@dataclass(frozen=True, eq=False)
class Variant:
    """TRAK or D-TRAK with one setting changed.

    Attributes:
        method: of which it is a variant.
        settings: all that is told of it.
        grid: (lambda, scores [Q, N]) of each lambda.
    """

    method: str
    settings: dict
    grid: Iterable[tuple[float, Tensor]]


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
            for dim in DIMS:
                told = {"timesteps": timesteps, "D": dim}
                yield Variant(method, told, grid(first(found, dim)))
            yield Variant(method, {**told, "solve": "float32"}, grid(found, Float32Kernel))


def large(materials: Materials) -> Iterator[Variant]:
    """The published dimension."""
    for method, loss in METHODS.items():
        for timesteps in TIMESTEPS:
            found = pair(materials, timesteps, loss, proj_dim=LARGE)
            yield Variant(method, {"timesteps": timesteps, "D": LARGE}, grid(found))


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
        {"num_noises": 4},
        {"normalize": True},
    )
    for method, loss in METHODS.items():
        for change in changes:
            yield Variant(method, {"timesteps": 10, "D": DIM, **change}, grid(pair(materials, 10, loss, **change)))


def checkpoints(materials: Materials) -> Iterator[Variant]:
    """Networks from earlier in the training."""
    for path in materials.checkpoints[:-1]:
        model, step = load_model(path).eval(), int(path.stem.removeprefix("main-"))
        for method, loss in METHODS.items():
            found = pair(materials, 10, loss, model, network=path.stem)
            yield Variant(method, {"timesteps": 10, "D": DIM, "checkpoint": step}, grid(found))


GROUPS: dict[str, Callable[[Materials], Iterator[Variant]]] = {
    function.__name__: function for function in (sizes, large, interpolations, functions, choices, checkpoints)
}


def judged(materials: Materials, group: str) -> list[dict]:
    """LDS of the variants of a group in percent: for each kind of queries with its interval, and the curve over lambda."""
    truth = GroundTruth.open(materials.problem.folder / "evaluation.safetensors")
    results = []
    for variant in GROUPS[group](materials):
        matrices = list(variant.grid)
        told: dict = {"method": variant.method, "settings": variant.settings}
        for name, part in zip(("validation", "generated"), parts(), strict=True):
            outputs = truth.outputs()[:, part]
            tuned = tune_on_split(((value, scores[part]) for value, scores in matrices), truth.masks, outputs)
            told[name] = {
                "lds": 100 * tuned.mean,
                "interval": [100 * end for end in tuned.interval],
                "lambda": [float(value) for value in tuned.chosen],
                "curve": {f"{value:.4g}": 100 * mean for value, mean in tuned.curve.items()},
                "best on the benchmark": 100 * float(np.nanmax(list(tuned.curve.values()))),
            }
        results.append(told)
    return results
