"""NDA: scores that need the training images alone, and where the strongest of them match."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ... import attribution
from ...attribution.patch_matches import Explanation, Match
from ...report import Attribution, Matched, strongest
from ..display import Display
from ..options import PatchOptions
from ..stages import SCHEDULE, Step, read_npz, write_npz
from .base import Scoring, draws, listed

EXPLAINED = 3  # training images of each query whose matching regions are shown
REGIONS = 3  # and how many of these


class PatchScoring(Scoring):
    """NDA's scores, and its matches."""

    summary = (
        "Asks no model. It compares each patch of the noised image with every patch of every training image, as the best "
        "denoiser that sees patches would, and adds up how much of that comparison falls to each training image: "
        "{sizes} pixels wide, and again at half the resolution."
    )
    meaning = "the share that its patches have in what the best patch-wise denoiser would make of that image"
    signed = False  # shares are never negative
    title = "hold the parts of"
    options: PatchOptions

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE, **rest):
        super().__init__(workspace, model_key, data, options, schedule, **rest)
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
            f"{self.method_name} matches",
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

    def _settings(self) -> list[tuple[str, str]]:
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

    def _caveats(self) -> list[str]:
        return [
            f"{self.method_name} never looks at the model: it says which training images a denoiser that sees only patches "
            "would use. How far a trained network does the same is another question.",
            f"{self.method_name}’s patch sizes, timesteps and the mixture of its two scales are reasonable values, not tuned "
            "on retrained models.",
        ]


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
