"""How long work tells the world where it stands."""

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
            stage: "train" (optimiser steps), "sample" (images), "features" or "query features" (images),
                "eigendecomposition" (1), "scores" (queries).
        """


def silent(done: int, total: int, stage: str) -> None:
    """The progress of a caller who asked for none."""
