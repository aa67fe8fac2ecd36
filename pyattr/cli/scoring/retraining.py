"""Methods that read a pool of models trained on subsets: no gradient, and no approximation but that of few models."""

from __future__ import annotations

from pathlib import Path

from ... import attribution
from ...evaluation import GroundTruth
from ...evaluation.ground_truth import subset_hashes
from ...report import Attribution
from ..options import PoolOptions
from ..stages import SCHEDULE, Queries, Step, read_npz, sha256, write_npz
from ..workspace import WorkspaceError, named_file
from .base import Scoring

# method -> its class, and what it does, for people
_KINDS = {
    "empirical-influence": (
        attribution.EmpiricalInfluence,
        "Asks {count:,} subsets of the training images, on each of which models were trained: the mean loss of the image under "
        "the models that did not see a training image, less that under the models that did.",
    ),
    "datamodel": (
        attribution.Datamodel,
        "Asks {count:,} subsets of the training images, on each of which models were trained: the coefficients of a ridge "
        "regression of the image’s loss on which training images the models saw, with their signs turned round.",
    ),
}


class RetrainingScoring(Scoring):
    """Empirical influence and datamodels.

    Raises:
        WorkspaceError, ValueError, DamagedFileError, ImportError: the pool is not there, or not one of these images.
    """

    meaning = "an estimate of how much lower the loss of that image is when a model is trained with it than without it"
    options: PoolOptions

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE, **rest):
        super().__init__(workspace, model_key, data, options, schedule, **rest)
        path = Path(options.pool)
        wanted = "--pool must be a file of pyattr.evaluation.build_ground_truth"
        if not path.is_file():
            raise WorkspaceError(f"{wanted}, got {path}")
        kind, summary = _KINDS[options.method]
        with named_file(path, wanted):
            self.pool = GroundTruth.open(path)
        self.method = kind(self.pool, target=options.target).fit(data.images)
        self.file = sha256(path)
        self.summary = summary.format(count=len(self.pool.masks))

    def check(self, queries: Queries) -> None:
        self.pool.rows(queries.images, type(self.method).__name__)

    def plan(self, queries_key: str, count: int) -> list[Step]:
        settings = {"pool": self.file, "target": self.options.target, "queries": queries_key}
        self.steps = [self._scores_step(settings, count, 4 * count * len(self.data))]
        return self.steps

    def run(self, model, queries, display, begin) -> Attribution:
        (step,) = self.steps
        path = step.stage.folder / "scores.npz"
        if not step.stage.finished:
            begin(step)
            with step.stage.work():
                write_npz(path, {"scores": self.method.scores(queries.images).numpy()})
        return self.attribution(read_npz(path)["scores"])

    def found(self) -> dict:
        return {"pool subsets": subset_hashes(self.pool.masks)}

    def _settings(self) -> list[tuple[str, str]]:
        subsets, seeds = self.pool.losses.shape[1:3]
        return [
            ("pool", self.options.pool),
            ("models", f"{subsets * seeds:,}: {subsets:,} subsets, {seeds:,} of each"),
            ("loss", self.options.target),
        ]

    def _caveats(self) -> list[str]:
        return [
            f"{self.method_name} knows {len(self.pool.masks):,} subsets; scores of single images are noisy unless these are "
            "many times the number of training images.",
            f"{self.method_name} must not be judged by the models that it has asked: it was told their answers.",
        ]
