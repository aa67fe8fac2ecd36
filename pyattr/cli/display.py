"""Progress for people: bars with the time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..report.page import seconds_text

UNITS = {
    "train": "steps",
    "sample": "denoising steps",
    "counterfactual": "denoising steps",
    "jacobian": "denoising steps",
    "last_step": "denoising steps",
    "members": "denoising steps",
    "classifier": "epochs",
    "image features": "images",
    "image distances": "pairs of images",
    "features": "images",
    "query features": "images",
    "residuals": "images",
    "scores": "queries",
    "patches": "passes",
    "matches": "pairs of images",
    "ground truth": "passes",
    "score files": "rows",
    "original": "passes",
    "retraining": "passes",
    "phi": "queries",
    "replay": "steps",
    "retrain": "steps",
    "metasmoothness": "steps",
}
LOG_EVERY = 20.0  # seconds between lines of a log


class Display:
    """Shows stages as they run; its :meth:`progress` is what long work calls.

    Args:
        console: where to.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console, self.clock = console, clock
        self._bars: Progress | None = None
        self._task: tuple[str, int] | None = None  # stage, bar
        self._log: _Log | None = None
        self._prefix = ""

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage(self, prefix: str) -> None:
        """What the following progress belongs to, "2/5 ". A new one starts new bars."""
        self._prefix, self._task, self._log = prefix, None, None

    def progress(self, done: int, total: int, stage: str) -> None:
        """`done` of `total` units of `stage` are finished; the first call says where resumed work starts."""
        if self._bars is None:
            if self._log is None or self._log.stage != stage:
                self._log = _Log(self, stage, done)
            self._log.note(done, total)
            return
        if self._task is None or self._task[0] != stage:
            # A bar starts at zero units, so that the time left counts only what this run does.
            bar = self._bars.add_task(f"{self._prefix}{stage}", total=total, completed=done, unit=UNITS.get(stage, ""))
            self._task = (stage, bar)
        self._bars.update(self._task[1], completed=done, total=total)


class _Log:
    """Plain lines for output that is not a terminal."""

    def __init__(self, display: Display, stage: str, first: int):
        self.display, self.stage, self.first = display, stage, first
        self.begin = self.last = display.clock()

    def note(self, done: int, total: int) -> None:
        now = self.display.clock()
        if done < total and now - self.last < LOG_EVERY:
            return
        self.last = now
        spent, fresh = now - self.begin, done - self.first
        if done >= total:
            ending = f", {seconds_text(spent)}"
        elif fresh:
            ending = f", {seconds_text(spent / fresh * (total - done))} left"
        else:
            ending = ""
        unit = UNITS.get(self.stage, "")
        self.display.say(f"{self.display._prefix}{self.stage} {done}/{total} {unit}".rstrip() + ending)
