"""The methods of `pyattr attribute`: what each plans, computes, keeps in the output folder, and has to say of itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .. import attribution, diffusion
from ..attribution.gradient_method import GradientMethod
from ..attribution.kernel import FRACTION, effective_dimension
from ..attribution.patch_matches import Explanation, Match
from ..datasets import ImageDataset
from ..diffusion.features import FeatureMap
from ..report import Attribution, Matched, strongest
from .display import Display
from .options import METHODS, NEEDS_MODEL, PatchOptions, ScoreOptions
from .stages import SCHEDULE, Queries, Step, read_npz, write_npz
from .workspace import Workspace

EXPLAINED = 3  # training images of each query whose matching regions are shown
REGIONS = 3  # and how many of these

_INFLUENCE = (
    "an estimate of how much its presence in the training set raised the likelihood that the model gives to that image"
)


# method -> its class, and what it does, for people
_GRADIENTS = {
    "dtrak": (
        attribution.DTRAK,
        "Compares gradients of the squared norm of the model’s noise prediction, averaged over timesteps, projected at random, "
        "and weighed by the damped inverse of their Gram matrix over all training images.",
    ),
    "trak": (attribution.TRAK, "The same with gradients of the training loss in place of the squared norm."),
    "relative-influence": (
        attribution.RelativeInfluence,
        "TRAK’s scores, each divided by how far its training image moves the model: what is rare does not lead every list.",
    ),
    "renormalized-influence": (
        attribution.RenormalizedInfluence,
        "TRAK’s scores, each divided by the length of its training image’s gradient.",
    ),
    "gradient-dot": (
        attribution.GradientDot,
        "The inner product of the gradients of the training loss, averaged over timesteps and projected at random: what one "
        "step of training on the one would do to the loss of the other.",
    ),
    "gradient-cosine": (
        attribution.GradientCosine,
        "The cosine of the angle between the gradients of the training loss, averaged over timesteps and projected at random.",
    ),
}


class Scoring:
    """Scores every training image for every query by one method.

    Attributes:
        name: for people.
        steps: of the plan, once :meth:`plan` was called.
        schedule: of the diffusion.

    Raises:
        ValueError: an option is not possible.
    """

    summary: str
    meaning: str
    signed = True
    title = "made"  # what the report asks: which training images did so

    def __init__(
        self,
        workspace: Workspace,
        model_key: str | None,
        data: ImageDataset,
        options: ScoreOptions | PatchOptions,
        schedule: diffusion.Schedule = SCHEDULE,
    ):
        self.workspace, self.model_key, self.data = workspace, model_key, data
        self.options, self.schedule = options, schedule
        self.name = METHODS[options.method]
        self.steps: list[Step] = []

    def plan(self, queries_key: str, count: int) -> list[Step]:
        """The steps for `count` queries."""
        raise NotImplementedError

    def run(
        self, model: nn.Module | None, queries: Queries, display: Display, begin: Callable[[Step], None]
    ) -> Attribution:
        """The scores, computed or found; `begin` is told which step the progress belongs to."""
        raise NotImplementedError

    def attribution(self, scores: np.ndarray, matches: tuple = ()) -> Attribution:
        """The scores as the report takes them."""
        return Attribution(self.name, scores, self.signed, self.summary, self.meaning, matches)

    def found(self) -> dict[str, float]:
        """What the finished scores were computed with, beyond the options."""
        return {}

    def settings(self) -> list[tuple[str, str]]:
        """The settings in words; none for a method without any."""
        return []

    def caveats(self) -> list[str]:
        """What the settings mean for how far the scores can be trusted."""
        raise NotImplementedError

    def _scores_step(self, settings: dict, count: int, size: int) -> Step:
        return Step(
            f"{self.name} scores",
            f"{count} queries × {len(self.data):,} images",
            self.workspace.stage(f"{self.options.method}-scores", settings),
            size,
        )


class GradientScoring(Scoring):
    """The methods of gradients: features that any query can use, then scores.

    Attributes:
        timesteps: those that the gradients are averaged over.
        damped: whether the method has a lambda.
    """

    meaning = _INFLUENCE

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE):
        super().__init__(workspace, model_key, data, options, schedule)
        self.kind, self.summary = _GRADIENTS[options.method]
        self.damped = issubclass(self.kind, attribution.TRAK)
        chosen = {name: getattr(options, name) for name in ("num_timesteps", "strategy", "kind", "proj_dim", "seed")}
        self.timesteps = FeatureMap(schedule, num_noises=options.query_noises, **chosen).timesteps().tolist()
        if options.lambda_ is not None and not 0 < options.lambda_ < math.inf:
            raise ValueError(f"attribute: lambda must be positive and finite, got {options.lambda_}")
        # Lambda and the queries' noise change no training feature, and memory no result but by rounding.
        settings = dataclasses.asdict(options)
        for name in ("lambda_", "query_noises", "memory"):
            del settings[name]
        # All methods of one gradient share its features.
        settings["method"] = features = "dtrak" if options.method == "dtrak" else "trak"
        self.base = {
            "model": model_key,
            "data": data.fingerprint(),
            "schedule": dataclasses.asdict(schedule),
            **settings,
        }
        self.features = Step(
            f"{METHODS[features]} features",
            f"{len(data):,} images, {options.num_timesteps} timesteps, {options.proj_dim:,} numbers each",
            workspace.stage(f"{features}-features", self.base),
            4 * options.proj_dim * len(data),
        )

    def plan(self, queries_key: str, count: int) -> list[Step]:
        settings = {
            **self.base,
            "method": self.options.method,
            "queries": queries_key,
            "query noises": self.options.query_noises,
            **({"lambda": self.options.lambda_} if self.damped else {}),
        }
        size = 4 * count * (len(self.data) + self.options.proj_dim)
        self.steps = [self.features, self._scores_step(settings, count, size)]
        return self.steps

    def run(self, model, queries, display, begin) -> Attribution:
        step = self.steps[-1]
        path = step.stage.folder / "scores.npz"
        if not step.stage.finished:
            fitted = None
            if not self.features.stage.finished:
                begin(self.features)
                with self.features.stage.work():
                    fitted = self._fit(model, display)
            begin(step)
            with step.stage.work() as notes:
                # Features that were found still have to be decomposed.
                fitted = fitted or self._fit(model, display)
                scores = fitted.scores(torch.from_numpy(queries.images), ids=queries.ids).numpy()
                if self.damped:
                    notes["lambda"] = fitted.lambda_
                    notes["effective dimension"] = effective_dimension(fitted.eigenvalues, fitted.lambda_)
                write_npz(path, {"scores": scores})
        return self.attribution(read_npz(path)["scores"])

    def _fit(self, model: nn.Module, display: Display) -> GradientMethod:
        left_out = {"method"} if self.damped else {"method", "lambda_"}
        options = {name: value for name, value in dataclasses.asdict(self.options).items() if name not in left_out}
        directory = self.features.stage.folder
        method = self.kind(model, self.schedule, directory=directory, progress=display.progress, **options)
        return method.fit(torch.from_numpy(self.data.images))

    def found(self) -> dict[str, float]:
        record = self.steps[-1].stage.record
        return {name: record[name] for name in ("lambda", "effective dimension")} if self.damped else {}

    def settings(self) -> list[tuple[str, str]]:
        o, found = self.options, self.found()
        told = [
            (
                "timesteps",
                f"{o.num_timesteps} of {self.schedule.num_timesteps:,}, {o.strategy}: {listed(self.timesteps)}",
            ),
            ("noise", f"{draws(1)} of a training image, {draws(o.query_noises)} of a query"),
            ("projection", f"{o.kind}, to {o.proj_dim:,} numbers, seed {o.seed}"),
        ]
        if self.damped:
            told += [
                ("lambda", f"{found['lambda']:.4g}, {'chosen automatically' if o.lambda_ is None else 'given'}"),
                ("effective dimension", f"{found['effective dimension']:.0f} of {min(o.proj_dim, len(self.data)):,}"),
            ]
        return told

    def caveats(self) -> list[str]:
        o = self.options
        told = [
            f"{self.name} averages gradients over {o.num_timesteps} of {self.schedule.num_timesteps:,} timesteps, with "
            f"{draws(1)} of a training image and {draws(o.query_noises)} of a query; published results use 10 to 1,000 "
            "timesteps. More of them make the scores steadier."
        ]
        if self.damped and o.lambda_ is None:
            told.append(
                "Lambda, the damping, was chosen from the spectrum of the training features alone, so as to leave an "
                f"effective dimension of {FRACTION:.0%} of the number of eigenvalues. No retrained model was there to tune "
                "it on, so it is a reasonable value, not the best."
            )
        elif self.damped:
            told.append(f"Lambda, the damping, was given as {o.lambda_:g}.")
        return [
            *told,
            f"The gradients of all parameters are compressed to {o.proj_dim:,} random combinations, "
            "which adds noise to every score.",
            "Scores are estimates for one trained model; no model was retrained without these images to confirm them.",
        ]


class PatchScoring(Scoring):
    """NDA: scores that need the training images alone, and where the strongest of them match."""

    summary = (
        "Asks no model. It compares each patch of the noised image with every patch of every training image, as the best "
        "denoiser that sees patches would, and adds up how much of that comparison falls to each training image: "
        "{sizes} pixels wide, and again at half the resolution."
    )
    meaning = "the share that its patches have in what the best patch-wise denoiser would make of that image"
    signed = False  # shares are never negative
    title = "hold the parts of"

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE):
        super().__init__(workspace, model_key, data, options, schedule)
        half = schedule.num_timesteps // 2
        if not 1 <= options.num_timesteps <= half:
            raise ValueError(f"attribute: patch_timesteps must lie in [1, {half}], got {options.num_timesteps}")
        self.terms = self._method().fit(data.images[:1]).terms  # those of all images of this size
        sizes = [term.patch_size for term in self.terms if not term.coarse]
        wide = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(min(sizes))
        self.summary = type(self).summary.format(sizes=wide)
        self.base = {
            "data": data.fingerprint(),
            "schedule": dataclasses.asdict(schedule),
            "terms": [dataclasses.asdict(term) for term in self.terms],
            **dataclasses.asdict(options),
        }

    def _method(self, **places) -> attribution.NDA:
        o, last = self.options, self.schedule.num_timesteps
        return attribution.NDA(
            self.schedule,
            timesteps=[last * i // (2 * o.num_timesteps) for i in range(1, o.num_timesteps + 1)],
            k=o.k,
            num_noises=o.num_noises,
            noise_seed=o.seed,
            **places,
        )

    def plan(self, queries_key: str, count: int) -> list[Step]:
        settings = {**self.base, "queries": queries_key}
        tables, pixels = len(self.terms) * self.options.num_noises, int(np.prod(self.data.shape[-2:]))
        # The tables' weights and the scores; the tables' normalisers.
        size = 4 * count * (tables + 1) * len(self.data) + 8 * count * tables * pixels
        scores = self._scores_step(settings, count, size)
        shown = min(EXPLAINED, len(self.data))
        matches = Step(
            f"{self.name} matches",
            f"where the {shown} strongest of each query match",
            self.workspace.stage("nda-matches", {**settings, "images": shown, "regions": REGIONS}),
            count * shown * 8 * (pixels + 100),
        )
        self.steps = [scores, matches]
        return self.steps

    def run(self, model, queries, display, begin) -> Attribution:
        scored, matched = self.steps
        score_path, match_path = scored.stage.folder / "scores.npz", matched.stage.folder / "matches.npz"
        method = self._method(directory=scored.stage.folder, progress=display.progress)
        if not scored.stage.finished:
            begin(scored)
            with scored.stage.work():
                scores = method.fit(self.data.images).scores(queries.images)
                write_npz(score_path, {"scores": scores.numpy()})
        scores = read_npz(score_path)["scores"]
        if not matched.stage.finished:
            begin(matched)
            with matched.stage.work():
                write_npz(match_path, self._explained(method, queries.images, scores, display))
        return self.attribution(scores, _matches(read_npz(match_path)))

    def _explained(self, method: attribution.NDA, images: np.ndarray, scores: np.ndarray, display: Display) -> dict:
        """Arrays over queries and their strongest images: `index`, `query_map`, `image_map`, `regions`."""
        columns = strongest(scores, min(EXPLAINED, scores.shape[1]))  # [Q, E]
        method.fit(self.data.images).scores(images)  # found: their normalisers are in memory now
        rows, total = [], columns.size
        display.progress(0, total, "matches")
        for image, row in zip(images, columns, strict=True):
            for n in row.tolist():
                rows.append(method.explain(image, n, pairs=REGIONS))
                display.progress(len(rows), total, "matches")
        regions = np.zeros((total, REGIONS, 7))  # query and image (row, column), (rows, columns), weight
        for into, explained in zip(regions, rows, strict=True):
            for line, match in zip(into, explained.matches, strict=False):
                line[:] = *match.query, *match.image, *match.size, match.weight
        maps = {name: np.stack([getattr(row, name).numpy() for row in rows]) for name in ("query_map", "image_map")}
        arrays = {"regions": regions, **maps}
        return {"index": columns} | {name: a.reshape(*columns.shape, *a.shape[1:]) for name, a in arrays.items()}

    def settings(self) -> list[tuple[str, str]]:
        o, times = self.options, list(dict.fromkeys(term.timestep for term in self.terms))
        fine, coarse = (
            ", ".join(str(term.patch_size) for term in self.terms if term.coarse == scale) for scale in (False, True)
        )
        return [
            ("timesteps", f"{o.num_timesteps} of {self.schedule.num_timesteps:,}: {listed(times)}"),
            ("patches", f"{fine} pixels, in turn; at half the resolution {coarse}"),
            ("counted at each place", f"the {o.k} best places of a training image"),
            ("noise", f"{draws(o.num_noises)}, the same for all, seed {o.seed}"),
        ]

    def caveats(self) -> list[str]:
        return [
            f"{self.name} never looks at the model: it says which training images a denoiser that sees only patches would "
            "use. How far a trained network does the same is another question.",
            f"{self.name}’s patch sizes, timesteps and the mixture of its two scales are reasonable values, not tuned on "
            "retrained models.",
        ]


class PixelScoring(Scoring):
    """The cosine between pixels, for contrast."""

    summary = (
        "A baseline that knows nothing of the model: the cosine of the angle between the pixel values, "
        "after the mean training image is taken off. It shows what looks alike, not what had an influence."
    )
    meaning = "how alike the two look, from 1 to −1. It says nothing of what the training image did to the model"
    signed = False
    title = "look like"

    def plan(self, queries_key: str, count: int) -> list[Step]:
        settings = {"data": self.data.fingerprint(), "queries": queries_key}
        self.steps = [self._scores_step(settings, count, 4 * count * len(self.data))]
        return self.steps

    def run(self, model, queries, display, begin) -> Attribution:
        (step,) = self.steps
        path = step.stage.folder / "scores.npz"
        if not step.stage.finished:
            begin(step)
            with step.stage.work():
                method = attribution.RawPixel("cosine", centre=True).fit(self.data.images)
                write_npz(path, {"scores": method.scores(queries.images).numpy()})
        return self.attribution(read_npz(path)["scores"])

    def caveats(self) -> list[str]:
        return [f"{self.name} compares pixels alone: what looks alike need not have had an influence on the model."]


def scoring_of(
    workspace: Workspace,
    model_key: str | None,
    data: ImageDataset,
    options: ScoreOptions | PatchOptions,
    schedule: diffusion.Schedule = SCHEDULE,
) -> Scoring:
    """The scoring of a method's options.

    Args:
        model_key: what tells the model from others; None where the method needs none.
    """
    method = options.method
    kind = GradientScoring if method in NEEDS_MODEL else {"nda": PatchScoring, "pixels": PixelScoring}[method]
    return kind(workspace, model_key, data, options, schedule)


def draws(count: int) -> str:
    """How often the noise of an image is drawn at a timestep, in words."""
    return "one noise draw at each" if count == 1 else f"{count:,} noise draws at each"


def listed(times: list[int]) -> str:
    """Timesteps in a line; of more than six the first four and the last."""
    return ", ".join(map(str, times if len(times) <= 6 else [*times[:4], "…", times[-1]]))


def _matches(arrays: dict[str, np.ndarray]) -> tuple[tuple[Matched, ...], ...]:
    """What :class:`PatchScoring` keeps, as the report takes it."""

    def matched(q: int, e: int) -> Matched:
        found = []
        for *places, weight in arrays["regions"][q, e].tolist():
            if weight > 0:  # else there were fewer
                r, c, r2, c2, height, width = map(int, places)
                found.append(Match((r, c), (r2, c2), (height, width), weight))
        maps = [torch.from_numpy(arrays[name][q, e]) for name in ("query_map", "image_map")]
        return Matched(int(arrays["index"][q, e]), Explanation(float(maps[0].sum()), *maps, tuple(found)))

    queries, explained = arrays["index"].shape
    return tuple(tuple(matched(q, e) for e in range(explained)) for q in range(queries))
