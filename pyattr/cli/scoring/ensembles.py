"""The mean of a method's scores over several models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...diffusion import Conditioned
from ...report import Attribution
from ..latents import LatentCheckpoint
from ..stages import Checkpoint, Step
from .base import Scoring
from .gradients import ESTIMATES, GradientScoring


class EnsembleScoring(Scoring):
    """A scoring for each model, whose scores are kept apart; what is read out is read out of their mean.

    Args:
        parts: at least two, alike but for their models.
        models: theirs.
        device: where models run, one at a time.

    Source: see :class:`pyattr.attribution.Ensemble`.
    """

    def __init__(
        self,
        parts: Sequence[GradientScoring],
        models: Sequence[Checkpoint | LatentCheckpoint],
        device: torch.device,
    ):
        first = parts[0]
        super().__init__(first.workspace, None, first.data, first.options, first.schedule, readout=first.readout)
        self.parts, self.models, self.device = parts, models, device
        self.method_name = f"{first.method_name}, mean of {len(parts)} models"
        self.summary = f"{first.summary} The scores are the means over {len(parts)} models, each by itself."
        self.meaning, self.signed, self.own, self.holds = first.meaning, first.signed, first.own, first.holds
        self.title = first.title

    def take(self, examples: Conditioned) -> None:
        super().take(examples)
        for part in self.parts:
            part.take(examples)

    def plan(self, queries_key: str, count: int) -> list[Step]:
        self.steps = [step for part in self.parts for step in part.plan(queries_key, count)]
        for number, part in enumerate(self.parts, 1):
            for step in part.steps:
                step.title += f", model {number}"
        return self.steps

    def run(self, model, queries, display, begin) -> Attribution:
        total = np.zeros((len(queries.images), len(self.data)))
        for part, place in zip(self.parts, self.models, strict=True):
            finished = part.steps[-1].stage.finished
            total += part.matrix(None if finished else place.run(self.device), queries, display, begin)
        return self.attribution((total / len(self.parts)).astype(np.float32))

    def chosen(self) -> dict:
        return self.parts[0].chosen()

    def found(self) -> dict:
        """Lists, of a number for each model, of what there is to say of all."""
        each = [part.found() for part in self.parts]
        names = [name for name in each[0] if all(name in one for one in each)]
        return {"models": len(each), **{name: [one[name] for one in each] for name in names}}

    def _settings(self) -> list[tuple[str, str]]:
        told: dict[str, dict[str, None]] = {}
        for part in self.parts:
            for name, words in part._settings():
                told.setdefault(name, {})[words] = None
        return [("models", str(len(self.parts))), *((name, "; ".join(words)) for name, words in told.items())]

    def _caveats(self) -> list[str]:
        return [
            *self.parts[0]._caveats()[:-1],
            ESTIMATES.format(models=f"{len(self.parts)} trained models, and their means"),
        ]
