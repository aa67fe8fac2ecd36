"""Many methods' scores against one ground truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .ground_truth import GroundTruth
from .lds import LDS, lds
from .scores import Scores
from .tuning import Tuned, tune_on_split


@dataclass(frozen=True)
class Row:
    """What there is to say of some scores and a readout of them.

    Attributes:
        name: of the file, or what stands for several.
        method, settings: of the scores; without a setting whose value was chosen.
        readout: its name.
        groups: the score over each group of queries; without those of which the scores have not all queries.
        tuned: how the value of a setting was chosen, see :attr:`pyattr.evaluation.Tuned.label`; empty: nothing was chosen.
        chosen: the setting with its value, or several in the order of the folds, for each group.
        curves: for each group the mean LDS of each value that there was to choose from.
    """

    name: str
    method: str
    settings: dict
    readout: str
    groups: dict[str, LDS]
    tuned: str = ""
    chosen: dict[str, dict] = field(default_factory=dict)
    curves: dict[str, dict] = field(default_factory=dict)

    def settings_in(self, group: str) -> dict:
        """The settings of the scores of a group, with what was chosen for it."""
        return {**self.settings, **self.chosen.get(group, {})}


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
        columns = scores.rows_in(self.truth)
        outputs = self.truth.outputs(self.target)[:, columns]
        found = []
        for readout, function in self.readouts.items():
            score = lds(function(scores.matrix), self.truth.masks, outputs, level=self.level)
            score.standard_error, score.bootstrap  # noqa: B018  the groups share what these compute
            groups = {group: score.take(rows) for group, rows in self._rows_of_groups(columns).items()}
            found.append(Row(name, scores.method, scores.settings, readout, groups))
        return found

    def tuned_rows(
        self, name: str, setting: str, grid: Sequence[Callable[[], Scores]], *, on_benchmark: bool = False
    ) -> list[Row]:
        """Of scores that differ in one setting, whose value is chosen for each readout and group; see :func:`tune_on_split`.

        Each group is tuned on its own queries, as published tables are for validation images and for generated ones.

        Args:
            name: of the rows.
            setting: the name of the setting.
            grid: what gives the scores of each value; called once for each readout and group.
            on_benchmark: tune on the benchmark; else on one half of the group's queries for the other, the same halves for
                all methods.

        Raises:
            ValueError: the scores are of other training images or queries, or their queries differ, or a group has but one.
        """
        first = grid[0]()
        columns = first.rows_in(self.truth)
        outputs = self.truth.outputs(self.target)[:, columns]
        settings = {key: value for key, value in first.settings.items() if key != setting}
        rows = []
        for readout, function in self.readouts.items():
            found: dict[str, Tuned] = {}
            for group, which in self._rows_of_groups(columns).items():
                if len(which) < 2 and not on_benchmark:
                    raise ValueError(
                        f"Scoreboard: to tune {setting}, {group} must have two queries, one for each half, got one"
                    )

                def values(function=function, which=which) -> Iterator[tuple[object, np.ndarray]]:
                    for give in grid:
                        scores = give()
                        scores.rows_in(self.truth)  # of its training images too
                        if scores.queries != first.queries:
                            raise ValueError(
                                f"Scoreboard: {scores.method} has other queries for some values of {setting}"
                            )
                        value = scores.settings[setting]
                        yield tuple(value) if isinstance(value, list) else value, function(scores.matrix[which])

                found[group] = tune_on_split(
                    values(), self.truth.masks, outputs[:, which], tune_on_benchmark=on_benchmark, level=self.level
                )
            rows.append(
                Row(
                    name,
                    first.method,
                    settings,
                    readout,
                    {group: tuned.score for group, tuned in found.items()},
                    next((tuned.label for tuned in found.values()), ""),
                    {
                        group: {setting: tuned.chosen[0] if len(set(tuned.chosen)) == 1 else list(tuned.chosen)}
                        for group, tuned in found.items()
                    },
                    {group: tuned.curve for group, tuned in found.items()},
                )
            )
        return rows

    def _rows_of_groups(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        """By group the rows of scores for these columns; of the groups that are among them as a whole."""
        place = {int(column): row for row, column in enumerate(columns)}
        return {
            name: np.array([place[int(column)] for column in group])
            for name, group in self.groups.items()
            if all(int(column) in place for column in group)
        }


def distinguishing(
    rows: Sequence[Row], *, group: str | None = None, but: str | None = None
) -> dict[tuple[str, str], str]:
    """By name and readout, the settings in which the rows that have them are not all alike, in words; and how one was tuned.

    Args:
        rows: any.
        group: of queries, for which values may have been chosen.
        but: a setting that is left out.
    """
    # A value that was tuned may be another for each readout.
    told = {
        (row.name, row.readout): {
            key: _word(value)
            for key, value in (row.settings if group is None else row.settings_in(group)).items()
            if key != but
        }
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
