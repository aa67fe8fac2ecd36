"""What the methods of `pyattr attribute` have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ... import diffusion
from ...attribution import Readout
from ...datasets import ImageDataset
from ...report import Attribution, Matched
from ..display import Display
from ..options import METHODS, MethodOptions
from ..stages import SCHEDULE, Queries, Step
from ..workspace import Workspace

INFLUENCE = (
    "an estimate of how much its presence in the training set raised the likelihood that the model gives to that image"
)
PLAIN = Readout("signed")
# readout -> its name, and what it does to a score, for people
_READOUTS = {
    "signed": ("signed", "the score itself, where the method alone would take its square"),
    "squared": ("squared", "its square, in which what is positive and what is negative cannot be told apart any more"),
    "signed_squared": ("signed square", "its square with its own sign"),
    "head": ("head of {percent:g}%", "itself if among the {percent:g}% of largest size for that image, else 0"),
}


class Scoring:
    """Scores every training image for every query by one method.

    Attributes:
        name: for people.
        steps: of the plan, once :meth:`plan` was called.
        schedule: of the diffusion.
        own: the readout that is the method's.
        holds: the readout that is in the scores as they are computed.
        examples: the training images as the model takes them, where that is not the images.

    Raises:
        ValueError: an option is not possible.
    """

    summary: str
    meaning: str
    signed = True
    own = PLAIN
    holds = PLAIN
    title = "made"  # what the report asks: which training images did so

    def __init__(
        self,
        workspace: Workspace,
        model_key: str | None,
        data: ImageDataset,
        options: MethodOptions,
        schedule: diffusion.Schedule = SCHEDULE,
        *,
        readout: Readout | None = None,
    ):
        self.workspace, self.model_key, self.data = workspace, model_key, data
        self.options, self.schedule, self.readout = options, schedule, readout or self.own
        self.method_name = METHODS[options.method]
        self.steps: list[Step] = []
        self.examples: diffusion.Conditioned | None = None

    @property
    def train(self) -> torch.Tensor | diffusion.Conditioned:
        """What methods that ask the model are fitted to."""
        return torch.from_numpy(self.data.images) if self.examples is None else self.examples

    @property
    def name(self) -> str:
        """The method's name, with its readout where that is not the score itself."""
        told = self._readout_in_words()
        return f"{self.method_name}, {told[0]}" if told else self.method_name

    def take(self, examples: diffusion.Conditioned) -> None:
        """Take what stands for the training images, in the order of the images."""
        self.examples = examples

    def check(self, queries: Queries) -> None:
        """Refuse queries that the method cannot take, before any work."""

    def plan(self, queries_key: str, count: int) -> list[Step]:
        """The steps for `count` queries."""
        raise NotImplementedError

    def run(
        self, model: nn.Module | None, queries: Queries, display: Display, begin: Callable[[Step], None]
    ) -> Attribution:
        """The scores, computed or found; `begin` is told which step the progress belongs to."""
        raise NotImplementedError

    def attribution(self, scores: np.ndarray, matches: Sequence[Sequence[Matched]] = ()) -> Attribution:
        """What is read out of the scores [Q, N], as the report takes it."""
        read = scores if self.readout == self.holds else self.readout(scores)
        summary, meaning, told = self.summary, self.meaning, self._readout_in_words()
        if told:
            summary += f" Of each score s stands here {told[1]}."
            meaning += f". What is shown of it is {told[1]}"
            matches = tuple(
                tuple(matched for matched in row if read[q, matched.index] != 0) for q, row in enumerate(matches)
            )
        return Attribution(self.name, read, self.signed and self.readout.signed, summary, meaning, matches)

    def chosen(self) -> dict[str, Any]:
        """The options that decide the scores: those that the method has, with its own values where none were given."""
        return dataclasses.asdict(self.options)

    def found(self) -> dict[str, Any]:
        """What the finished scores were computed with, beyond the options."""
        return {}

    def settings(self) -> list[tuple[str, str]]:
        """The settings in words; none for a method without any."""
        told = self._readout_in_words()
        return [*self._settings(), *([("readout", f"{told[0]}: of each score {told[1]}")] if told else [])]

    def caveats(self) -> list[str]:
        """What the settings mean for how far the scores can be trusted."""
        told = self._caveats()
        if self.readout != self.own and self.signed and not self.readout.signed:
            told.append(
                f"{self.name}, has no sign: images that made a query likelier and images that made it less likely stand in "
                "one list, by size alone."
            )
        return told

    def _settings(self) -> list[tuple[str, str]]:
        return []

    def _caveats(self) -> list[str]:
        raise NotImplementedError

    def _readout_in_words(self) -> tuple[str, str] | None:
        if self.readout == self.own:
            return None
        name, does = (text.format(percent=self.readout.percent) for text in _READOUTS[self.readout.name])
        return name, does

    def _scores_step(self, settings: dict, count: int, size: int) -> Step:
        return Step(
            f"{self.method_name} scores",
            f"{count} queries × {len(self.data):,} images",
            self.workspace.stage(f"{self.options.method}-scores", settings),
            size,
        )


def draws(count: int) -> str:
    """How often the noise of an image is drawn at a timestep, in words."""
    return "one noise draw at each" if count == 1 else f"{count:,} noise draws at each"


def listed(times: list[int]) -> str:
    """Timesteps in a line; of more than six the first four and the last."""
    return ", ".join(map(str, times if len(times) <= 6 else [*times[:4], "…", times[-1]]))
