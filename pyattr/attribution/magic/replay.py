"""A training whose states can be had again from the last to the first: kept, or made once more and compared."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...diffusion.checkpoint import identity, numbered
from ...diffusion.progress import Pace, Progress, silent
from ...diffusion.storage import DamagedFileError, differences, load_record, load_tensors, save_tensors, tensors_hash
from .rows import Rows, named
from .schemes import Scheme
from .training import State, WeightedTraining

SAVE_SECONDS = 60.0  # between states or adjoints that are kept only in case the work is interrupted
_CHUNK = 1 << 24


class Replay:
    """A training with given weights.

    Args:
        training: what is trained.
        weights: w, [N] on its device.
        scheme: which states are kept.
        directory: where those that training lays down go, one file each, so that an interrupted training is taken up and
            a finished one is not repeated; None keeps them in memory. Those that a reversal makes are in memory.
        settings: identifies the training, for the directory.
        progress: stage "train".

    Attributes:
        advanced: steps that were made, training included.
        most_states: how many were kept at a time, beside the last that was made.
        resumed_from: the step that training went on from.
        losses: of the steps that this object trained, by step.

    Raises:
        ValueError: the directory holds another training; the message says what differs.
    """

    def __init__(
        self,
        training: WeightedTraining,
        weights: Tensor,
        scheme: Scheme,
        *,
        directory: Path | None = None,
        settings: dict | None = None,
        progress: Progress = silent,
    ):
        self.training, self.weights, self.scheme = training, weights, scheme
        self.directory, self.settings, self.progress = directory, settings or {}, progress
        self.advanced, self.most_states, self.resumed_from = 0, 0, 0
        self.losses: dict[int, float] = {}
        self._states: dict[int, State | Path] = {}
        self._last: tuple[int, State] | None = None  # the last that was made
        # Of the parameters of each state of the training: whatever else goes wrong in a step shows in them at the next.
        self._marks = torch.zeros(training.steps + 1, dtype=torch.int64)
        self._keep(0, training.initial())

    def train(self) -> State:
        """The final state.

        Raises:
            FloatingPointError: the loss is not finite.
            RuntimeError: the first step comes out otherwise than when the directory was made.
        """
        steps = self.training.steps
        self._find()
        if steps in self._states:
            self.resumed_from = steps
            return self._load(steps)
        step = self.resumed_from = max(self._states)
        state, pace, extra = self._load(step), Pace(SAVE_SECONDS), None
        self.progress(step, steps, "train")
        while step < steps:
            if step + 1 == steps:
                self._last = step, state
            state, self.losses[step] = self._advance(state, step)
            step += 1
            self._marks[step] = _mark(state)
            due = self.directory is not None and pace.due()
            if step in self.scheme.laid or step == steps or due:
                with pace.saving():
                    self._keep(step, state, on_disk=True)
                    if extra is not None:
                        self._drop(extra)
                    extra = step if due and step < steps and step not in self.scheme.laid else None
            self.progress(step, steps, "train")
        for other in set(self._states) - self.scheme.laid - {steps}:
            self._drop(other)
        return state

    def backwards(self, start: int) -> Iterator[tuple[int, State]]:
        """The states before steps ``start`` - 1, ..., 0, each with its step.

        Raises:
            RuntimeError: a state that was made again is not what it was.
        """
        parts = [self.scheme.whole()]
        lasting = self.scheme.lasting
        while parts:
            part = parts.pop()
            if part.lo >= start:
                continue
            if part.hi - part.lo > 1:
                points, smaller = self.scheme.divide(part)
                for point in points:
                    if point < start and point not in self._states:
                        self._keep(point, self._at(point))
                parts += smaller
                continue
            yield part.lo, self._at(part.lo)
            if part.lo not in lasting:
                self._drop(part.lo)

    def _at(self, step: int) -> State:
        """A state, from the nearest before it that is there."""
        nearest = max(other for other in self._states if other <= step)
        if self._last is not None and nearest < self._last[0] <= step:
            nearest, state = self._last
        else:
            try:
                state = self._load(nearest)
            except DamagedFileError:
                self._drop(nearest)
                return self._at(step)
        for number in range(nearest, step):
            state, _ = self._advance(state, number)
            self._check(number + 1, state)
        self._last = step, state
        return state

    def _advance(self, state: State, step: int) -> tuple[State, float]:
        self.advanced += 1
        return self.training.advance(state, step, self.weights)

    def _check(self, step: int, state: State) -> None:
        if _mark(state) != int(self._marks[step]):
            raise RuntimeError(
                f"MAGIC: step {step - 1} made again differs from what it was: the model, the loss or the number of threads "
                f"has changed, or they are not deterministic (see torch.use_deterministic_algorithms)"
            )

    def _keep(self, step: int, state: State, on_disk: bool = False) -> None:
        if not on_disk or self.directory is None:
            self._states[step] = state
        else:
            path = self.directory / f"state-{step:08d}.safetensors"
            tensors = {**state._asdict(), "marks": self._marks[: step + 1]}
            save_tensors(path, tensors, {"kind": "state", "step": step, "settings": self.settings})
            self._states[step] = path
        self.most_states = max(self.most_states, len(self._states) - (self.training.steps in self._states))

    def _load(self, step: int) -> State:
        kept = self._states[step]
        if isinstance(kept, State):
            return kept
        tensors, _ = load_tensors(kept)
        return State(*(tensors[name].to(self.training.device) for name in State._fields))

    def _drop(self, step: int) -> None:
        kept = self._states.pop(step, None)
        if isinstance(kept, Path):
            kept.unlink()

    def _find(self) -> None:
        """Take note of the states in the directory."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        newest = 0
        for step, path in reversed(numbered(self.directory, "state").items()):
            try:
                record = load_record(path)
                changed = differences(record["settings"], self.settings)
                if changed:
                    raise ValueError(
                        f"MAGIC: {self.directory} holds another training ({changed}): give another directory"
                    )
                if not newest:
                    self._marks[: step + 1] = load_tensors(path)[0]["marks"]
                    newest = step
            except DamagedFileError:
                path.unlink()  # made again
                continue
            self._states[step] = path
        if newest:  # a loss has no name that one could compare
            self._check(1, self._advance(self.training.initial(), 0)[0])


def settings_of(start: nn.Module, train: Rows, weights: Tensor, recipe: dict) -> dict:
    """What identifies a training, for its directory.

    Args:
        start: the model that it starts with.
        train: the N items.
        weights: w, [N].
        recipe: steps, batch_size, optimiser, seed.
    """
    return {
        **recipe,
        "optimiser": dataclasses.asdict(recipe["optimiser"]),
        **{f"initial {name}": value for name, value in identity(start).items()},
        "train": tensors_hash(named(train)),
        "weights": tensors_hash({"weights": weights}),
    }


def _mark(state: State) -> int:
    """The first 8 bytes of a SHA-256 of the parameters."""
    digest = hashlib.sha256()
    theta = state.theta.detach().cpu().view(torch.uint8)
    for start in range(0, len(theta), _CHUNK):
        digest.update(theta[start : start + _CHUNK].numpy())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
