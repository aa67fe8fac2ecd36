"""What a run leaves for people and programs: report.html and scores.npz."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..datasets import ImageDataset
from ..diffusion.conditioned import Conditioned, examples_hash
from ..diffusion.schedule import ScaledLinearSchedule, Schedule
from ..evaluation.ground_truth import image_hashes
from ..report import Attribution, Report, shown_count, strongest, write
from .latents import Encoding
from .scoring import Scoring
from .stages import Queries, Step, shape_text, write_npz

TOP = 10
_BETAS = {Schedule: "linear", ScaledLinearSchedule: "linear in their roots"}
# weighting of the training loss -> name for people
LOSSES = {"simple": "squared error of the noise", "velocity": "squared error of the velocity"}


def write_scores(
    path: Path,
    data: ImageDataset,
    train: Tensor | Conditioned,
    queries: Queries,
    attributions: Sequence[Attribution],
    settings: dict,
    top: int,
) -> None:
    """Write scores.npz: the first method's scores and strongest images, and the other methods' scores.

    Arrays: `scores` [Q, N] float32, `proponents` and `opponents` [Q, K] int64: the columns of the largest and of the smallest
    scores, whatever their sign (no opponents when the method has none), `queries` [Q, C, H, W] uint8, `labels` [N] int64
    (empty without labels), `class_names`, `ids` [N] of the training images, `methods`, `signed` (whether a negative score of
    each means an opponent), `images_hash` and `query_hashes` [Q] of what the model took, `settings` (JSON), and `scores_2`, ...
    for other methods.
    """
    main = attributions[0]
    count = shown_count(top, len(data))
    arrays = {
        "scores": main.scores,
        "proponents": strongest(main.scores, count),
        "opponents": strongest(main.scores, count if main.signed else 0, largest=False),
        "queries": queries.images,
        "query_names": np.array(queries.names),
        "labels": np.empty(0, np.int64) if data.labels is None else data.labels,
        "class_names": np.array(data.class_names, str),
        "ids": np.array(data.ids),
        "methods": np.array([attribution.method for attribution in attributions]),
        "signed": np.array([attribution.signed for attribution in attributions]),
        "images_hash": np.array(examples_hash(train)),
        "query_hashes": np.array(image_hashes(queries.asked)),
        "settings": np.array(json.dumps(settings)),
    }
    arrays |= {f"scores_{number}": other.scores for number, other in enumerate(attributions[1:], 2)}
    write_npz(path, arrays)


def write_report(
    path: Path,
    *,
    title: str,
    data: ImageDataset,
    queries: Queries,
    attributions: Sequence[Attribution],
    scorings: Sequence[Scoring],
    steps: Sequence[Step],
    caveats: Sequence[str] = (),
    top: int = TOP,
) -> None:
    """Write report.html from finished stages."""
    losses = [loss for step in steps for loss in step.stage.record.get("losses", [])]
    write(
        path,
        Report(
            title=title,
            queries=queries.images,
            query_names=queries.names,
            train=data,
            attributions=attributions,
            settings=settings_of(data, steps, scorings),
            timings=[step.timing() for step in steps],
            caveats=list(dict.fromkeys([*caveats, *(told for scoring in scorings for told in scoring.caveats())])),
            losses=losses,
            top=top,
            generated=queries.generated,
        ),
    )


def settings_of(
    data: ImageDataset, steps: Sequence[Step], scorings: Sequence[Scoring]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """All settings in words, by group, as the report shows them."""
    groups = [
        (
            "Data",
            [
                ("source", data.name),
                ("images", f"{len(data):,} of {shape_text(data.shape)}"),
                ("SHA-256 of the pixels", data.fingerprint()[:16] + "…"),
            ],
        )
    ]
    schedule = scorings[0].schedule
    for step in steps:
        chosen = step.stage.settings
        if step.stage.name == "train":
            warmup = f"{chosen['learning_rate']:g}, warmup over {chosen['warmup']:.0%} of the steps, then a cosine"
            weights = "those of the last step" if chosen["ema"] is None else f"moving average, decay {chosen['ema']:g}"
            pairs = [
                ("network", f"{chosen['network']}, {step.stage.record['parameters']:,} parameters"),
                ("steps × batch", f"{chosen['steps']:,} × {chosen['batch_size']}"),
                ("AdamW's betas", "{:g}, {:g}".format(*chosen["betas"])),
                ("learning rate", warmup),
                ("loss", LOSSES[chosen["weighting"]]),
                ("weights", weights),
                ("dropout, flips", f"{chosen['dropout']:g}, {'yes' if chosen['flip'] else 'no'}"),
                ("seed", str(chosen["seed"])),
            ]
            groups.append((step.title, pairs))
        if isinstance(step, Encoding):
            groups.append((step.title, step.words()))
        if step.stage.name == "generate":
            method = chosen["method"].upper() + (f", eta {chosen['eta']:g}" if chosen["method"] == "ddim" else "")
            pairs = [("sampler", f"{method}, {chosen['steps']} steps"), ("seed", str(chosen["seed"]))]
            groups.append((step.title, pairs))
    groups.append(
        (
            "Diffusion",
            [
                ("timesteps", f"{schedule.num_timesteps:,}"),
                ("betas", f"{_BETAS[type(schedule)]}, {schedule.beta_start:g} to {schedule.beta_end:g}"),
            ],
        )
    )
    groups += [(scoring.name, pairs) for scoring in scorings if (pairs := scoring.settings())]
    machine = [
        ("pyattr", __version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
        ("processor", f"{platform.machine()}, {torch.get_num_threads()} threads"),
    ]
    return [*groups, ("Machine of the last run", machine)]


def settings_dict(data: ImageDataset, steps: Sequence[Step], scorings: Sequence[Scoring]) -> dict:
    """All settings for programs, as scores.npz keeps them."""
    settings = {
        "pyattr": __version__,
        "data": {"source": data.name, "images": len(data), "sha256": data.fingerprint()},
        "schedule": dataclasses.asdict(scorings[0].schedule),
        "methods": [
            {
                "name": scoring.name,
                **scoring.chosen(),
                "readout": dataclasses.asdict(scoring.readout),
                **scoring.found(),
            }
            for scoring in scorings
        ],
    }
    for step in steps:
        if step.stage.name in ("train", "generate"):
            settings[step.stage.name] = step.stage.settings
        if isinstance(step, Encoding):
            settings["latents"] = step.found()
    return settings
