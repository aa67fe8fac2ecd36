"""ProbedDAS: gradients of the prediction along random directions beside those of the loss."""

from __future__ import annotations

from ... import attribution
from ...attribution import Readout
from ..stages import SCHEDULE, Step
from ..workspace import WorkspaceError
from .gradients import GradientScoring


class ProbedScoring(GradientScoring):
    """Training features that all methods of the loss share, those along directions, then scores, which are squares.

    Raises:
        WorkspaceError: an option that goes with other methods alone.
    """

    meaning = "an estimate of the mean squared change of the model’s prediction for that image without it, for better or worse"
    signed = False
    own = holds = Readout("squared")

    def __init__(self, workspace, model_key, data, options, schedule=SCHEDULE, **rest):
        super().__init__(workspace, model_key, data, options, schedule, **rest)
        if self.readout != self.own:
            raise WorkspaceError(
                "attribute: probed-das is a mean of squares, which has no sign: leave --readout away, or give squared"
            )
        if self.normalize:
            raise WorkspaceError("attribute: probed-das is of gradients in their own size: leave --normalize away")
        settings = {"model": model_key, **self.base, "directions": options.train_probes}
        self.directions = Step(
            "Gradients along directions",
            f"{len(data):,} images, {options.train_probes} directions at each timestep",
            workspace.stage("directions", settings),
            4 * options.proj_dim * len(data) * options.train_probes,
        )

    def plan(self, queries_key: str, count: int) -> list[Step]:
        *features, scores = super().plan(queries_key, count)
        scores.size += 4 * count * self.options.proj_dim * (self.options.probes - 1)
        self.steps = [*features, self.directions, scores]
        return self.steps

    def _fitted(self, model, display, begin):
        folder = self.features.stage.folder
        if not self.features.stage.finished:
            begin(self.features)
            with self.features.stage.work():
                attribution.GradientDot(model, self.schedule, **self._of_features(folder, display)).fit(self.train)
        if self.directions.stage.finished:
            return None
        begin(self.directions)
        with self.directions.stage.work():  # they lie beside the features, where the method looks for them
            return self._fit(model, folder, display)

    def _rows(self) -> int:
        return len(self.data) * self.options.train_probes

    def _weights(self) -> dict[str, bool | int]:
        return {"probes": self.options.probes, "train_probes": self.options.train_probes}

    def _settings(self) -> list[tuple[str, str]]:
        o = self.options
        return [
            *super()._settings(),
            ("directions", f"{o.train_probes} at each timestep of a training image, {o.probes} of a query"),
        ]
