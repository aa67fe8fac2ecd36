"""What each method costs on the network of a problem: measured from nothing, beside what the count of its operations says.

``python -m bench.lds costs cifar2 --work FOLDER``, on an idle machine, keeps the numbers in costs.json;
``<!-- lds:cifar2 costs -->`` in a page holds the table.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pyattr.attribution import (
    DAS,
    DTRAK,
    GAS,
    NDA,
    TRAK,
    Ensemble,
    GradientDot,
    JourneyTRAK,
    ProbedDAS,
    RawPixel,
    TracInCP,
)
from pyattr.diffusion import features, load_model, sample, train
from pyattr.diffusion.features import FeatureMap
from pyattr.diffusion.progress import silent

from .. import machine
from . import problem as settings
from .methods import DIM, Materials
from .problem import SCHEDULE, Problem

TRAIN, QUERIES, TIMESTEPS = 256, 64, 10  # N, Q, K of what is measured
FEW, MANY, SOME = 2, 12, 64  # timesteps and images that tell a gradient from a projection
STEPS = 20  # of training
PROBES = 8
SAMPLER_STEPS = 50  # the default
TABLE = "costs.json"


@dataclass(frozen=True)
class Units:
    """Seconds of one gradient at one timestep, of one projection, of one forward pass and of one step of training."""

    gradient: float
    projection: float
    forward: float
    step: float

    @property
    def features(self) -> float:
        """Of one image."""
        return TIMESTEPS * self.gradient + self.projection


def measure(problem: Problem, work: Path) -> None:
    """Measure all of it and keep it beside the scores."""
    materials = Materials(problem, work, silent)
    units = _units(materials)
    rows = [
        {"method": name, "counted": count(units), "measured": _seconds(lambda run=run: run(materials))}
        for name, (count, run) in METHODS.items()
    ]
    models = settings.POOL
    one = settings.SUBSET_STEPS * units.step + QUERIES * settings.TIMESTEPS * units.forward
    rows.append(
        {
            "method": f"Datamodel, {models} models of {settings.IMAGES // 2} images",
            "counted": models * one,
            "measured": None,
        }
    )
    found = {
        "problem": problem.name,
        "N": TRAIN,
        "Q": QUERIES,
        "K": TIMESTEPS,
        "D": DIM,
        "parameters": sum(p.numel() for p in materials.model.parameters()),
        "units": {name: 1e3 * getattr(units, name) for name in ("gradient", "projection", "forward", "step")},
        "rows": rows,
        "machine": machine.describe(),
        "commit": machine.commit(),
    }
    (problem.folder / TABLE).write_text(json.dumps(found, indent=1, default=str) + "\n")


def table(problem: Problem) -> str:
    """What was measured, the cheapest first."""
    path = problem.folder / TABLE
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    unit = found["units"]
    lines = [
        f"GRAD {unit['gradient']:.2f} ms, PROJ {unit['projection']:.2f} ms, a forward pass {unit['forward']:.2f} ms, "
        f"a training step of {settings.TRAINING['batch_size']} images {unit['step']:.0f} ms.",
        "",
        "| method | counted, s | measured, s |",
        "|---|---:|---:|",
    ]
    for row in sorted(found["rows"], key=lambda row: row["measured"] or row["counted"]):
        counted, measured = (
            "–" if row[name] is None else f"{row[name]:.3g}" if row[name] < 100 else f"{row[name]:.0f}"
            for name in ("counted", "measured")
        )
        lines.append(f"| {row['method']} | {counted} | {measured} |")
    return "\n".join(lines)


def _units(materials: Materials) -> Units:
    images, model = materials.images[:SOME], materials.model

    def of(timesteps: int) -> float:
        feature_map = FeatureMap(SCHEDULE, loss="simple", num_timesteps=timesteps, proj_dim=DIM)
        return _seconds(lambda: features.compute(model, images, feature_map, batch_size=32))

    few, many = min(of(FEW), of(FEW)), min(of(MANY), of(MANY))
    gradient = (many - few) / (SOME * (MANY - FEW))
    if not 0 < gradient < few / (SOME * FEW):
        raise RuntimeError(f"costs: {FEW} timesteps took {few:.2f} s and {MANY} {many:.2f} s: the machine is not idle")
    x, t = torch.zeros(256, *images.shape[1:]), torch.arange(256)
    with torch.no_grad():
        forward = min(_seconds(lambda: model(x, t)) for _ in range(3)) / len(x)
    network = materials.problem.network()
    options = {**settings.TRAINING, "schedule": SCHEDULE, "steps": STEPS}
    step = _seconds(lambda: train(network, materials.images, **options)) / STEPS
    return Units(gradient, few / SOME - FEW * gradient, forward, step)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _gradients(kind, **more) -> Callable[[Materials], object]:
    return lambda materials: _run(kind, materials.model, materials, materials.queries[:QUERIES], **more)


def _run(kind, model, materials: Materials, queries, **more):
    return _method(kind, model, **more).fit(materials.images[:TRAIN]).scores(queries)


def _method(kind, model, **more):
    return kind(model, SCHEDULE, proj_dim=DIM, num_timesteps=TIMESTEPS, batch_size=32, **more)


def _history(kind) -> Callable[[Materials], object]:
    return lambda materials: _gradients(kind, checkpoints=materials.checkpoints)(materials)


def _journey(materials: Materials):
    samples = sample(materials.model, SCHEDULE, num_images=QUERIES, steps=SAMPLER_STEPS, record="trajectory")
    return _run(JourneyTRAK, materials.model, materials, samples)


def _ensemble(materials: Materials):
    methods = [_method(DTRAK, load_model(path).eval()) for path in materials.checkpoints[-2:]]
    return Ensemble(methods).fit(materials.images[:TRAIN]).scores(materials.queries[:QUERIES])


def _pixels(materials: Materials):
    return RawPixel("cosine").fit(materials.images[:TRAIN]).scores(materials.queries[:QUERIES])


def _patches(materials: Materials):
    return NDA(SCHEDULE).fit(materials.images[:TRAIN]).scores(materials.queries[:QUERIES])


METHODS: dict[str, tuple[Callable[[Units], float | None], Callable[[Materials], object]]] = {
    "RawPixel": (lambda units: None, _pixels),
    "NDA": (lambda units: None, _patches),
    "GradientDot": (lambda units: (TRAIN + QUERIES) * units.features, _gradients(GradientDot)),
    "TRAK": (lambda units: (TRAIN + QUERIES) * units.features, _gradients(TRAK)),
    "DTRAK": (lambda units: (TRAIN + QUERIES) * units.features, _gradients(DTRAK)),
    "DAS": (lambda units: (TRAIN + QUERIES) * (units.features + TIMESTEPS * units.gradient), _gradients(DAS)),
    f"ProbedDAS, M = {PROBES}, L = 1": (
        lambda units: (2 * TRAIN + PROBES * QUERIES) * units.features,
        _gradients(ProbedDAS, probes=PROBES),
    ),
    "TracInCP, 4 checkpoints": (lambda units: 4 * (TRAIN + QUERIES) * units.features, _history(TracInCP)),
    "GAS, 4 checkpoints": (lambda units: 4 * (TRAIN + QUERIES) * units.features, _history(GAS)),
    f"JourneyTRAK, S = {SAMPLER_STEPS}, sampling included": (
        lambda units: (
            TRAIN * units.features + QUERIES * (SAMPLER_STEPS * (2 * units.forward + units.gradient) + units.projection)
        ),
        _journey,
    ),
    "Ensemble of 2 DTRAK, trained": (lambda units: 2 * (TRAIN + QUERIES) * units.features, _ensemble),
}
