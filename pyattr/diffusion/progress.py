"""How long work tells the world where it stands, and keeps what it has."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol


class Progress(Protocol):
    """A callable that long work calls after each piece of it, from the thread that does the work.

    An exception raised inside ends the work as an interruption would; what is on disk then is whole.
    """

    def __call__(self, done: int, total: int, stage: str) -> None:
        """Take note that ``done`` of ``total`` units of ``stage`` are finished.

        Args:
            done: 0 to ``total``. Resumed work starts at what it found, so a rate is (done - first done) / time.
            total: units in this stage; the same in every call of one stage.
            stage: "train" (optimiser steps), "sample" (steps of images), "features", "query features" or "latents" (images),
                "eigendecomposition" (1), "patches" and "tuning" (passes of a query over the training images), "matches"
                (pairs of a query and a training image), "counterfactual", "jacobian", "last_step" and "members" (steps of
                images), "classifier" (epochs), "image features" (images), "image distances" (pairs of images), "ground truth",
                "original" and "retraining" (passes of an image through a model; a training step makes three with each of its
                images), "tail patch" (training images), "phi"
                (queries), "replay", "retrain" and "metasmoothness" (optimiser steps).
        """


def silent(done: int, total: int, stage: str) -> None:
    """The progress of a caller who asked for none."""


class Pace:
    """When to save again: after so many seconds, and never for more than a twentieth of the time.

    Args:
        seconds: between saves.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.next = time.monotonic() + seconds

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self.next

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """The save itself, from whose end and length the next is reckoned."""
        begin = time.monotonic()
        yield
        end = time.monotonic()
        self.next = end + max(self.seconds, 20 * (end - begin))
