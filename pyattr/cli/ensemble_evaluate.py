"""`pyattr ensemble evaluate`: what ablations do, how well they are guessed, and how good the images are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.table import Table
from torch import Tensor

from ..attribution import EncodedEnsemble
from ..diffusion import Samples
from ..evaluation import (
    Classifier,
    Distances,
    Extractor,
    convergence,
    feature_distances,
    inception,
    l2,
    lpips,
    nested_codes,
)
from ..evaluation.encoded import GUESSES, class_results, convergence_summary, guess_results, quality, random_items
from ..report.encoded import agreement_plot, class_grid, class_plane
from ..report.grid import matplotlib
from ..report.numbers import numbers, p_and_effect, percent, write_results
from .classifying import Classifying
from .display import Display
from .ensemble_folder import Ablating, Derivatives, class_rows, found_codes, found_samples, samples_of
from .kept_features import kept, kept_distances
from .options import EvaluateOptions, Machine
from .run import Session, session
from .stages import Step
from .workspace import Stage, Workspace, WorkspaceError

SETTLING = 12  # samples whose nested ensembles are followed, at most
FEATURES, NUMBER = 1000, 8  # of Inception-v3; bytes of a number, generously
SEEN = "the folder's labelled images, which the members saw as well"


def evaluate(out: Path, options: EvaluateOptions, machine: Machine) -> None:
    """Evaluate the folder's ensemble and its samples."""
    matplotlib()
    with session(out, machine) as work:
        job = _Job(work, options)
        work.plan(job.steps)
        found = job.run()
        folder = work.workspace.folder
        write_results(folder / "ensemble-evaluation.json", found)
        shown = numbers(found)
        work.display.console.print(_figures(shown))
        if "agreement" in shown:
            work.display.console.print(_guesses(shown))
        work.display.say(f"done; numbers  {folder / 'ensemble-evaluation.json'}")
        for picture in job.pictures:
            work.display.say(f"picture  {picture}")


class _Guessing(Step):
    """The two baselines for guessing ablations; what is kept serves any codes."""

    def __init__(self, workspace: Workspace, sampled: Stage, ensemble: EncodedEnsemble, batch_size: int):
        self.batch_size = batch_size
        queries, members = sampled.settings["num_images"], ensemble.num_members
        super().__init__(
            "Baselines",
            f"of {queries} images: the last step alone, and {members} members alone",
            workspace.stage("ensemble-baselines", {"samples": sampled.key, "batch_size": batch_size}),
            4 * queries * (2 * members + 1) * int(np.prod(ensemble.shape)),
        )

    def run(
        self, ensemble: EncodedEnsemble, samples: Samples, codes: np.ndarray, display: Display
    ) -> dict[str, Tensor]:  # each [Q, M, C, H, W]
        with self.working():
            return {
                GUESSES[method]: ensemble.approximate(
                    samples,
                    codes,
                    method,
                    batch_size=self.batch_size,
                    directory=self.stage.folder,
                    progress=display.progress,
                )
                for method in ("last_step", "members")
            }


class _Job:
    """All that is to be evaluated of a folder: its steps are known before any of them is done.

    Raises:
        WorkspaceError: there is nothing to evaluate, or too little.
        ImportError, RuntimeError: the standard networks cannot be had.
    """

    def __init__(self, work: Session, options: EvaluateOptions):
        self.work, self.options = work, options
        self.images, codes, self.encoded = found_codes(work)
        self.sampled, self.ensemble = found_samples(work)
        self.pictures: list[Path] = []
        folder, members, queries = work.workspace, self.ensemble.num_members, self.sampled.settings["num_images"]
        if queries < 2:
            raise WorkspaceError(
                f"one image is too few to evaluate: run `pyattr ensemble sample --num-images 2 --out {folder.folder}` first"
            )
        rows = {} if self.images.labels is None else class_rows(self.images)
        self.classes = list(rows)  # names
        self.by_class = self.encoded.settings["kind"] != "items"
        judged = len(rows) > 1  # so it is where codes are by class: of one class there is a member that sees no image
        self.network = self._standard() if options.extractor == "standard" else None

        def ablating(codes: np.ndarray, title: str, what: str, queries: int | None = None) -> Ablating:
            return Ablating(folder, self.sampled, self.ensemble, codes, options.batch_size, title, what, queries)

        self.classifying = None
        if judged:
            self.classifying = Classifying(
                folder, self.images, options.epochs, name="ensemble-classifier", also=", which members saw too"
            )
        self.without = self.alone = self.derivatives = self.guessing = self.features = None
        if self.by_class:
            self.names, chosen = self.classes, codes[list(rows.values())]
            self.without = ablating(chosen, "Ablating", f"each without {len(rows)} classes in turn")
        elif options.guesses:
            if options.items > len(self.images):
                raise WorkspaceError(
                    f"--items must be at most the number of training images, {len(self.images)}, got {options.items}"
                )
            items = random_items(len(self.images), options.items, options.seed)
            self.names, chosen = [self.images.ids[item] for item in items], codes[items]
            self.without = ablating(chosen, "Ablating", f"each without {len(items)} training images in turn")
        if options.guesses:
            self.derivatives = Derivatives(folder, self.sampled, self.ensemble, options.jacobian_batch_size)
            self.guessing = _Guessing(folder, self.sampled, self.ensemble, options.batch_size)
        if judged or self.network is not None:
            others = np.uint64(2**members - 1) ^ np.uint64(1) << np.arange(members, dtype=np.uint64)
            self.alone = ablating(others, "Members", f"by each of {members} members alone")
        if self.network is not None:
            pairs = queries * len(rows) if self.by_class else 0
            images = len(self.images) + queries * (members + 1)
            settings = {"samples": self.sampled.key, "data": self.images.fingerprint()}
            self.features = Step(
                "Features",
                f"of {images:,} images by {self.network.name}" + (f", LPIPS of {pairs:,} pairs" if pairs else ""),
                folder.stage("ensemble-features", settings),
                NUMBER * (images * FEATURES + pairs),
            )
        self.settling = ablating(
            nested_codes(members, seed=options.seed),
            "Settling",
            f"by 1 to {members} members",
            min(SETTLING, queries),
        )
        mine = (
            self.classifying,
            self.without,
            self.alone,
            self.features,
            self.derivatives,
            self.guessing,
            self.settling,
        )
        self.steps = [step for step in mine if step is not None]

    def _standard(self) -> Extractor:
        """The standard networks, or their absence told before any work is done."""
        network = inception()
        if self.by_class:
            lpips(self.images.images[:1], self.images.images[:1])
        network.module.to(self.work.device)
        return network

    def run(self) -> dict:
        """Results by names for people; the pictures are written."""
        work, display, ensemble = self.work, self.work.display, self.ensemble
        samples = samples_of(work, ensemble, self.sampled)
        found: dict = {"settings": self._settings()}
        judge = without = None
        if self.classifying is not None:
            work.begin(self.classifying)
            labels = np.unique(self.images.labels, return_inverse=True)[1]
            judge = self.classifying.run(self.images, labels, display)
            accuracy = float((judge.predict(self.images.images) == labels).mean())
            found["classifier"] = {"trained on": SEEN, "accuracy on them": accuracy}
        if self.without is not None:
            work.begin(self.without)
            without = self.without.run(ensemble, samples, display)  # [Q, M, C, H, W]
        if self.alone is not None:
            work.begin(self.alone)
            alone = self.alone.run(ensemble, samples, display)  # [Q, n, C, H, W]
            with self._measures(judge) as (extractor, measure):
                if self.by_class:
                    found["class ablation"] = self._class_ablation(samples, without, labels, judge, measure)
                found |= quality(samples.images, alone, self.images.images, extractor).summary()
        guesses = {}
        if self.guessing is not None:
            guessed = self._guess(samples, without)
            found["ablated"] = self.names
            found |= guessed.summary()
            guesses = guessed.agreements
        work.begin(self.settling)
        nested = self.settling.run(ensemble, samples, display)
        settling = convergence((nested + 1) / 2)
        found["convergence, mean L2"] = convergence_summary(settling)
        agreement_plot(self._picture("guesses" if guesses else "settling"), guesses, settling)
        return found

    def _settings(self) -> dict:
        return {
            "data": self.images.name,
            "images": len(self.images),
            "members": self.ensemble.num_members,
            "codes": self.encoded.settings["kind"],
            "samples": {name: value for name, value in self.sampled.settings.items() if name != "model"},
            **dataclasses.asdict(self.options),
        }

    @contextlib.contextmanager
    def _measures(self, judge: Classifier | None):
        """The extractor of the Fréchet distance, and the distance of pairs that goes with it."""
        if self.features is None:
            extractor = judge.extractor
            yield extractor, lambda first, second: feature_distances(first, second, extractor)
            return
        self.work.begin(self.features)
        with self.features.working():
            folder, told = self.features.stage.folder, self.work.display.progress
            yield kept(self.network, folder, told), kept_distances(lpips, folder, told)

    def _class_ablation(
        self,
        samples: Samples,
        without: Tensor,
        labels: np.ndarray,
        judge: Classifier,
        measure: Callable[[Tensor, Tensor], Distances],
    ) -> dict:
        results = class_results(samples.images, without, judge.predict, (l2, measure))
        name = list(results.distances)[1]
        grid = self._picture("classes")
        class_grid(grid, samples.images, without, results.classes, results.distances[name], self.classes)
        images, plane = self.images.images, self.work.workspace.folder / "ensemble-evaluation-plane.png"
        try:
            class_plane(plane, judge.extractor, images, labels, samples.images, without, results, self.classes)
        except ValueError as error:  # too few images, or features that are all equal
            self.work.display.say(f"no picture of the features: {error}")
        else:
            self.pictures.append(plane)
        return {"classes": self.classes, **results.summary()}

    def _guess(self, samples: Samples, without: Tensor):
        work, ensemble, codes = self.work, self.ensemble, self.without.codes
        work.begin(self.derivatives)
        self.derivatives.run(ensemble, samples, work.display)
        guesses = {GUESSES["jacobian"]: ensemble.approximate(samples, codes)}
        work.begin(self.guessing)
        guesses |= self.guessing.run(ensemble, samples, codes, work.display)
        return guess_results(samples.images, without, guesses)

    def _picture(self, name: str) -> Path:
        self.pictures.append(self.work.workspace.folder / f"ensemble-evaluation-{name}.png")
        return self.pictures[-1]


def _figures(found: dict) -> Table:
    """The results that are looked at first, but for those of guesses."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    if "classifier" in found:
        table.add_row("classifier's accuracy where it learned", f"{100 * found['classifier']['accuracy on them']:.1f}%")
    ablation = found.get("class ablation")
    if ablation is not None:
        own = "own class most influential, by "
        for name, each in ablation["by distance"].items():
            table.add_row(own + name, percent(each["most influential ablation is of the sample's class"]))
        table.add_row(own + "chance", f"{100 / len(ablation['classes']):.1f}%")
        for kind in ("own ablation", "another ablation"):
            table.add_row(f"{kind} changes the class", percent(ablation[f"{kind} flips the class"]))
    for name, each in found.items():
        if isinstance(each, dict) and "ensemble" in each:
            table.add_row(f"{name}, ensemble", f"{each['ensemble']:.4g}")
            table.add_row(f"{name}, members", f"{min(each['members']):.4g} to {max(each['members']):.4g}")
    distances = found["convergence, mean L2"]["to the full ensemble"]
    for count in sorted({1, max(1, len(distances) // 2), len(distances) - 1}):
        table.add_row(f"mean L2 between {count} and all {len(distances)} members", f"{distances[count - 1]:.4g}")
    return table


def _guesses(found: dict) -> Table:
    """How the ways of guessing agree with exact ablations."""
    kinds = ("Pearson", "Spearman")
    # Narrow, so that 80 columns hold it.
    table = Table("ablations guessed by", *(f"{kind}'s correlation" for kind in kinds), box=None, padding=(0, 1, 0, 0))
    for name, each in found["agreement"].items():
        table.add_row(name, *(_median(each, kind) for kind in kinds))
        if name in found["Jacobian against"]:
            tests = found["Jacobian against"][name]
            table.add_row("  Jacobian against it", *(p_and_effect(tests[kind.lower()]) for kind in kinds))
    return table


def _median(figures: dict, kind: str) -> str:
    if figures[f"median {kind}"] is None:
        return "not defined"
    low, high = figures[f"{kind} quartiles"]
    return f"{figures[f'median {kind}']:.3f} ({low:.3f} to {high:.3f})"
