"""What the numbers of TRAK and D-TRAK depend on: one setting changed at a time, all else as in the table.

Every entry is judged with the best lambda of the grid, chosen on half of the queries and reported on the other half, both ways.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyattr.attribution import QUERY_IDS
from pyattr.attribution.kernel import DampedKernel
from pyattr.diffusion import features, load_model
from pyattr.diffusion.features import FeatureMap
from pyattr.diffusion.store import Features

from . import problem as settings
from .methods import DIM, LAMBDAS, Workplace
from .problem import SCHEDULE

METHODS = {"TRAK": "simple", "D-TRAK": "square"}
DIMS = (512, 4096, 32768)
TIMESTEPS = (10, 100)
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FUNCTIONS = ("elbo", "avg", "l1", "l2", "linf")


@dataclass(frozen=True, eq=False)
class Variant:
    """TRAK or D-TRAK with one setting changed.

    Attributes:
        setting, value: which, and to what.
        method: of which it is a variant.
        grid: (lambda, scores [Q, N]) of each lambda.
    """

    setting: str
    value: str
    method: str
    grid: Iterable[tuple[float, Tensor]]


def pair(
    place: Workplace, model: torch.nn.Module | None = None, name: str = "main", **given
) -> tuple[Features, Features]:
    """Features of the training images and of the queries, kept under what decides them."""
    feature_map = FeatureMap(SCHEDULE, **{"proj_dim": DIM, **given})
    words = "-".join(f"{key}={value}" for key, value in sorted(given.items()))
    folder = place.work / "ablations" / f"{name}-{words}"
    ids = torch.arange(len(place.queries)) + QUERY_IDS
    made = [
        features.compute(
            model or place.model,
            images,
            feature_map,
            ids=which,
            batch_size=64,
            directory=folder / part,
            progress=place.progress,
            stage=stage,
        )
        for images, which, part, stage in (
            (place.images, None, "train", "features"),
            (place.queries, ids, "queries", "query features"),
        )
    ]
    return made[0], made[1]


def grid(train: Features, queries: Features, **solve) -> Iterator[tuple[float, Tensor]]:
    """Scores at each lambda of the benchmark's grid."""
    kernel = DampedKernel(train, **solve)
    lambdas = [float(kernel.eigenvalues[0]) * value for value in LAMBDAS]
    return zip(lambdas, kernel.grid(queries.tensor(), lambdas), strict=True)


def first(found: Features, dim: int) -> Features:
    """The first columns, which are the features of a smaller projection: a column's signs do not depend on their number."""
    return Features.from_tensor(found.tensor()[:, :dim].contiguous(), found.ids)


def sizes(place: Workplace) -> Iterator[Variant]:
    """Timesteps by dimensions."""
    for method, loss in METHODS.items():
        for timesteps in TIMESTEPS:
            train, queries = pair(place, loss=loss, num_timesteps=timesteps, proj_dim=max(DIMS))
            for dim in DIMS:
                value = f"K={timesteps}, D={dim}"
                yield Variant("timesteps and dimension", value, method, grid(first(train, dim), first(queries, dim)))


def interpolations(place: Workplace) -> Iterator[Variant]:
    """Between TRAK and D-TRAK; features are linear in eta, so two sets give all of them."""
    simple, square = (pair(place, loss=loss, num_timesteps=10) for loss in ("simple", "square"))
    for eta in ETAS:
        train, queries = (
            Features.from_tensor(eta * b.tensor() + (1 - eta) * (a.tensor() - b.tensor()), a.ids)
            for a, b in zip(simple, square, strict=True)
        )
        yield Variant("eta", f"{eta:g}", "D-TRAK", grid(train, queries))


def functions(place: Workplace) -> Iterator[Variant]:
    """Other functions in place of the two."""
    for loss in FUNCTIONS:
        yield Variant("function", loss, "D-TRAK", grid(*pair(place, loss=loss, num_timesteps=10)))


def strategies(place: Workplace) -> Iterator[Variant]:
    """Which timesteps, and how many draws of the noise at each."""
    for method, loss in METHODS.items():
        for strategy in ("cumulative", "midpoint"):
            yield Variant(
                "strategy", strategy, method, grid(*pair(place, loss=loss, num_timesteps=10, strategy=strategy))
            )
        found = pair(place, loss=loss, num_timesteps=10, num_noises=4)
        yield Variant("noises", "4", method, grid(*found))


def checkpoints(place: Workplace) -> Iterator[Variant]:
    """Networks from earlier in the training."""
    for path in place.checkpoints[:-1]:
        model = load_model(path).eval()
        for method, loss in METHODS.items():
            found = pair(place, model, path.stem, loss=loss, num_timesteps=10)
            yield Variant("checkpoint", path.stem.removeprefix("main-"), method, grid(*found))


def members(place: Workplace) -> list[Path]:
    """Networks that were trained on halves, for ensembles."""
    return [place.problem.folder / "models" / f"half-{member}.safetensors" for member in range(settings.MEMBERS)]
