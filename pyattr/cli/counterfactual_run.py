"""What `pyattr evaluate counterfactual` does: retraining without the images that the folder's scores name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from .. import diffusion
from ..attribution import readout
from ..evaluation import Counterfactuals, Effects, Extractor, clip
from ..evaluation import counterfactual as retrain
from ..evaluation.scoreboard import AS_THEY_ARE
from ..report.counterfactual import effects_plot, images_grid
from ..report.grid import matplotlib
from ..report.numbers import numbers, write_results
from .classifying import Classifying
from .display import Display
from .evaluate_counterfactual import CounterfactualOptions
from .options import SQUARES, DataOptions, Machine, SampleOptions, TrainOptions
from .run import Session, session
from .score_files import without_readout
from .stages import SCHEDULE, Checkpoint, Sampling, Step, read_npz
from .workspace import Stage, Workspace, WorkspaceError

FIFTH = 5  # of the images are removed by default, as in the published experiments
STATES = (
    3 * 4
)  # of a training that lie on the disk at once, of four bytes a number: weights and two moments, and one more


def counterfactual(out: Path, options: CounterfactualOptions, machine: Machine) -> None:
    """Retrain, sample and compare in an output folder."""
    matplotlib()
    if not out.exists():  # a name that was mistyped makes no folder
        raise _without_model(out)
    with session(out, machine) as work:
        job = _Job(work, options)
        work.plan(job.steps)
        found, effects = job.run()
        folder = work.workspace.folder
        results = {"settings": job.settings(), **_figures(effects)}
        write_results(folder / "counterfactual.json", results)
        pictures = folder / "counterfactual-effects.png", folder / "counterfactual-images.png"
        effects_plot(pictures[0], effects)
        images_grid(pictures[1], found)
        shown = numbers(results)
        for count in found.remove:
            # Queries that share their models are no independent units of a test.
            table = _table(
                shown[f"{count} removed"], f"without {count} of {len(job.images):,}", tests=not options.together
            )
            work.display.console.print(table)
        told = ", ".join(map(str, found.remove))
        work.display.say(f"done; {found.retrained} models trained, each without {told} of {len(job.images):,} images")
        work.display.say(f"numbers  {folder / 'counterfactual.json'}")
        for picture in pictures:
            work.display.say(f"picture  {picture}")


def _without_model(out: Path) -> WorkspaceError:
    return WorkspaceError(f"no trained model in {out}: run `pyattr train SOURCE --out {out}` first")


class _Retraining(Step):
    """Retrains for some queries and methods; models that an earlier call trained are used again."""

    def __init__(self, workspace: Workspace, job: _Job, sampled: Stage, trained: Stage):
        options, shape = job.options, job.images.shape
        # What decides a model and its samples, but not which of them there are.
        self.folder = workspace.stage(
            "counterfactual-models",
            {"samples": sampled.key, "timesteps": options.timesteps, "num_noises": options.num_noises},
        ).folder
        scores = hashlib.sha256(
            b"".join(name.encode() + values.tobytes() for name, values in job.scores.items())
        ).hexdigest()
        settings = {
            "models": self.folder.name,
            "scores": scores,
            "remove": job.remove,
            "queries": job.queries,
            "together": options.together,
            "seed": options.seed,
        }
        models = (len(job.scores) + 1) * len(job.remove) * (1 if options.together else job.queries)
        results = models * (job.queries if options.together else 1) * (4 * int(np.prod(shape)) + len(job.images) + 1000)
        state = 4 * STATES * trained.record["parameters"]
        told = ", ".join(map(str, job.remove))
        super().__init__(
            "Retraining",
            f"{models} models at most, without {told} of {len(job.images):,} images",
            workspace.stage("counterfactual", settings),
            2 * results + state * min(options.workers, models),
        )

    def run(self, job: _Job, samples: diffusion.Samples, display: Display, device: torch.device) -> Counterfactuals:
        path = self.stage.folder / "counterfactuals.safetensors"
        if self.stage.finished:
            return Counterfactuals.open(path)
        options = dataclasses.asdict(job.recipe)
        network, dropout = options.pop("network"), options.pop("dropout")
        channels, size, _ = job.images.shape
        with self.stage.work():
            found = retrain(
                self.folder,
                functools.partial(diffusion.unet, network, channels=channels, size=size, dropout=dropout),
                job.images.images,
                samples[: job.queries],
                job.scores,
                schedule=SCHEDULE,
                remove=job.remove,
                together=job.options.together,
                reference=job.trained.folder,
                control_seed=job.options.seed,
                timesteps=job.options.timesteps,
                num_noises=job.options.num_noises,
                workers=job.options.workers,
                device=device,
                progress=display.progress,
                **options,
            )
            found.save(path)
        return found


class _Job:
    """All that is to be done in a folder, and whether it can be.

    Raises:
        WorkspaceError: the folder lacks a model, its images or their scores, or these do not belong together.
        ImportError, RuntimeError: CLIP cannot be had.
    """

    def __init__(self, work: Session, options: CounterfactualOptions):
        self.work, self.options = work, options
        workspace, out = work.workspace, work.workspace.folder
        trained = workspace.existing(workspace.recall("train").get("stage", "."))
        if trained is None:
            raise _without_model(out)
        generated = workspace.existing(workspace.recall("generate").get("stage", "."))
        if generated is None or generated.settings["model"] != trained.key:
            raise WorkspaceError(f"no images of this model in {out}: run `pyattr generate --out {out}` first")
        self.trained, self.generated = trained, generated
        self.recipe = TrainOptions(**{name: trained.settings[name] for name in TrainOptions.__dataclass_fields__})
        data = DataOptions(**workspace.recall("data"))
        self.images = work.load(data)
        self.model = Checkpoint(trained.folder, trained.key)
        if not self.model.trained_on(self.images):
            raise WorkspaceError(f"{data.source} has changed since the model was trained on it: put the images back")
        self.queries = options.queries or generated.settings["num_images"]
        if self.queries > generated.settings["num_images"]:
            raise WorkspaceError(
                f"--queries must be at most the number of generated images, {generated.settings['num_images']}, "
                f"got {self.queries}"
            )
        self.remove = options.remove or (max(1, len(self.images) // FIFTH),)
        if max(self.remove) >= len(self.images):
            raise WorkspaceError(
                f"--remove must be less than the number of training images, {len(self.images)}, got {max(self.remove)}"
            )
        self.scores = self._scores()
        self.extractor, self.classifying = self._features()
        self.retraining = _Retraining(workspace, self, generated, trained)
        self.steps = [step for step in (self.retraining, self.classifying) if step is not None]

    def _scores(self) -> dict[str, np.ndarray]:
        """Of each method and readout asked for, [Q, N]."""
        out = self.work.workspace.folder
        if not (out / "scores.npz").exists():
            raise WorkspaceError(f"no scores in {out}: run `pyattr attribute --out {out}` first")
        arrays = read_npz(out / "scores.npz", remedy=f"run `pyattr attribute --out {out}` again")
        settings = json.loads(arrays["settings"].item())
        if (
            settings.get("generate") != self.generated.settings
            or settings["data"]["sha256"] != self.images.fingerprint()
        ):
            raise WorkspaceError(
                f"{out / 'scores.npz'} holds scores of other images: run `pyattr attribute --out {out}` again, "
                "without --queries and --data"
            )
        keys = [f"scores_{number}" if number > 1 else "scores" for number in range(1, len(arrays["methods"]) + 1)]
        there = {each["method"]: number for number, each in enumerate(settings["methods"])}
        asked = self.options.methods or tuple(there)
        missing = [name for name in asked if name not in there]
        if missing:
            # The file holds the methods of one call: one that named the missing alone would leave the others out.
            every = " ".join(f"--method {name}" for name in (*there, *missing))
            raise WorkspaceError(
                f"no scores by {', '.join(missing)} in {out / 'scores.npz'}, which has {', '.join(there)}: "
                f"run `pyattr attribute --out {out} {every}` first"
            )
        read = {name: settings["methods"][there[name]]["readout"]["name"] for name in asked}
        if "head" in read.values():
            raise WorkspaceError(
                f"{out / 'scores.npz'} holds heads of scores, which leave most images at 0 and in no order: run "
                f"`pyattr attribute --out {out}` again, without --readout head"
            )
        readable = {name: bool(arrays["signed"][there[name]]) and read[name] == "signed" for name in asked}
        apart = without_readout(readable, self.options.readouts)
        if apart and read.get("das") == "squared":
            apart += "; `pyattr attribute --readout signed` keeps the number of which das is the square"
        if apart:
            self.work.display.say(apart)
        return {
            _title(name, str(arrays["methods"][there[name]]), kind): readout(
                arrays[keys[there[name]]][: self.queries], kind
            )
            for name in asked
            for kind in self.options.readouts
            if readable[name] or kind == AS_THEY_ARE
        }

    def _features(self) -> tuple[Extractor | None, Classifying | None]:
        """What features come from: a network that is there, or a classifier that is to be trained."""
        labels = self.images.labels
        classes = 0 if labels is None else len(np.unique(labels))
        kind = self.options.features or ("classifier" if classes > 1 else "none")
        if kind == "clip":
            extractor = clip()
            extractor.module.to(self.work.device)
            return extractor, None
        if kind == "none":
            return None, None
        if classes < 2:
            raise WorkspaceError(
                f"--features classifier needs labels of two classes, and {self.images.name} has {classes}"
            )
        return None, Classifying(self.work.workspace, self.images, self.options.epochs)

    def run(self) -> tuple[Counterfactuals, list[Effects]]:
        """What was made, and its measures."""
        work, settings = self.work, self.generated.settings
        chosen = SampleOptions(
            **{name: settings[name] for name in SampleOptions.__dataclass_fields__ if name in settings}
        )
        model = self.model.run(work.device)
        samples = Sampling(work.workspace, self.model.key, self.images.shape, chosen).run(model, work.display)
        work.begin(self.retraining)
        found = self.retraining.run(self, samples, work.display, work.device)
        effects, extractor = [found.l2], self.extractor
        if self.classifying is not None:
            work.begin(self.classifying)
            labels = np.unique(self.images.labels, return_inverse=True)[1]
            extractor = self.classifying.run(self.images, labels, work.display).extractor
        if extractor is not None:
            effects.append(found.cosine(extractor))
        return found, [*effects, found.loss_change()]

    def settings(self) -> dict:
        return {
            "data": self.images.name,
            "images": len(self.images),
            "train": self.trained.settings,
            "generate": self.generated.settings,
            **dataclasses.asdict(self.options),
            "methods": list(self.scores),
            "remove": self.remove,
            "queries": self.queries,
        }


def _title(method: str, title: str, kind: str) -> str:
    """Of a readout of the scores of this title; the square of the number before a square is the method itself."""
    if kind == AS_THEY_ARE:
        return title
    own = title.removesuffix(", signed")
    return own if kind == "squared" and method in SQUARES else f"{own}, {kind.replace('_', ' ')}"


def _figures(effects: list[Effects]) -> dict:
    """By number removed and measure: medians with their intervals, and tests of each method against each other one."""
    return {
        f"{count} removed": {
            each.name: {
                "methods": {
                    method: {
                        "median": each.median(method, count),
                        "interval": each.interval(method, count),
                        "queries": each.of(method, count),
                    }
                    for method in each.methods
                },
                "paired by query": {
                    f"{first} against {second}": each.compare(first, second, count)
                    for first, second in itertools.combinations(each.methods, 2)
                },
            }
            for each in effects
        }
        for count in effects[0].counts
    }


def _table(found: dict, title: str, *, tests: bool) -> Table:
    """Medians by method, with p against the control if asked for."""
    table = Table(title, *found, box=None, padding=(0, 1, 0, 0))
    methods = list(next(iter(found.values()))["methods"])
    for method in methods:
        table.add_row(method, *(_median(each["methods"][method]) for each in found.values()))
        if tests and method != methods[-1]:
            pairs = (each["paired by query"][f"{method} against {methods[-1]}"] for each in found.values())
            table.add_row("  against random", *(f"p = {pair['p']:.2g}" for pair in pairs), style="dim")
    return table


def _median(found: dict) -> str:
    if found["median"] is None:
        return "not defined"
    low, high = found["interval"]
    return f"{found['median']:.3g} ({low:.3g} to {high:.3g})"
