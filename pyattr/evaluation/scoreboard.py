"""Many methods' scores against one ground truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .ground_truth import GroundTruth
from .lds import LDS, lds
from .scores import Scores
from .tuning import tune_on_split, two_folds


@dataclass(frozen=True)
class Row:
    """What there is to say of some scores and a readout of them.

    Attributes:
        name: of the file, or what stands for several.
        method, settings: of the scores.
        readout: its name.
        tuned: how the value of a setting was chosen, see :attr:`pyattr.evaluation.Tuned.label`; empty: nothing was chosen.
        groups: the score over each group of queries; without those of which the scores have not all queries.
        curve: the mean LDS of each value that there was to choose from.
    """

    name: str
    method: str
    settings: dict
    readout: str
    tuned: str
    groups: dict[str, LDS]
    curve: dict


@dataclass(frozen=True)
class Scoreboard:
    """How scores are judged.

    Attributes:
        truth: the ground truth.
        target: which of its losses.
        readouts: functions of scores [Q, N] by name; see :class:`pyattr.attribution.readouts.Readout`.
        groups: columns of the ground truth's queries by name.
        level: of the intervals.
    """

    truth: GroundTruth
    target: str
    readouts: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    groups: Mapping[str, np.ndarray]
    level: float = 0.95

    def rows(self, name: str, scores: Scores) -> list[Row]:
        """Of one method's scores, a row for each readout.

        Raises:
            ValueError: the scores are of other training images or queries.

        Extra memory: 32 M Q bytes for each readout stay.
        """
        columns, outputs = self._judged(scores)
        return [
            Row(
                name,
                scores.method,
                scores.settings,
                readout,
                "",
                self._grouped(lds(function(scores.matrix), self.truth.masks, outputs, level=self.level), columns),
                {},
            )
            for readout, function in self.readouts.items()
        ]

    def tuned_rows(
        self, name: str, setting: str, grid: Sequence[Callable[[], Scores]], *, on_benchmark: bool = False
    ) -> list[Row]:
        """Of scores that differ in one setting, whose value is chosen for each readout; see :func:`tune_on_split`.

        Args:
            name: of the rows.
            setting: the name of the setting.
            grid: what gives the scores of each value; called once for each readout.
            on_benchmark: tune on the benchmark; else on one half of all queries of the ground truth for the other, the same
                halves for all methods.

        Raises:
            ValueError: the scores are of other training images or queries, or their queries differ.
        """
        rows = []
        for readout, function in self.readouts.items():
            first = grid[0]()
            columns, outputs = self._judged(first)

            def values(function=function, queries=first.queries) -> Iterable[tuple[object, np.ndarray]]:
                for give in grid:
                    scores = give()
                    if scores.queries != queries:
                        raise ValueError(f"Scoreboard: {scores.method} has other queries for some values of {setting}")
                    value = scores.settings[setting]
                    yield tuple(value) if isinstance(value, list) else value, function(scores.matrix)

            tuned = tune_on_split(
                values(),
                self.truth.masks,
                outputs,
                folds=None if on_benchmark else two_folds(len(self.truth.query_ids))[columns],
                tune_on_benchmark=on_benchmark,
                level=self.level,
            )
            settings = {
                **first.settings,
                setting: tuned.chosen[0] if len(set(tuned.chosen)) == 1 else list(tuned.chosen),
            }
            groups = self._grouped(tuned.score, columns)
            rows.append(Row(name, first.method, settings, readout, tuned.label, groups, tuned.curve))
        return rows

    def _judged(self, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
        columns = scores.rows_in(self.truth)
        return columns, self.truth.outputs(self.target)[:, columns]

    def _grouped(self, score: LDS, columns: np.ndarray) -> dict[str, LDS]:
        score.standard_error, score.bootstrap  # noqa: B018  the groups share what these compute
        place = {int(column): row for row, column in enumerate(columns)}
        return {
            name: score.take(np.array([place[int(column)] for column in group]))
            for name, group in self.groups.items()
            if all(int(column) in place for column in group)
        }


def distinguishing(rows: Sequence[Row], *, but: str | None = None) -> dict[tuple[str, str], str]:
    """By name and readout, the settings in which the rows that have them are not all alike, in words; and how one was tuned.

    Args:
        rows: any.
        but: a setting that is left out.
    """
    # A value that was tuned may be another for each readout.
    told = {
        (row.name, row.readout): {key: _word(value) for key, value in row.settings.items() if key != but}
        for row in rows
    }
    values: dict[str, set[str]] = {}
    for settings in told.values():
        for key, word in settings.items():
            values.setdefault(key, set()).add(word)
    tuned = {(row.name, row.readout): [row.tuned] if row.tuned else [] for row in rows}
    return {
        row: ", ".join([*(f"{key}={word}" for key, word in settings.items() if len(values[key]) > 1), *tuned[row]])
        for row, settings in told.items()
    }


def _word(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
