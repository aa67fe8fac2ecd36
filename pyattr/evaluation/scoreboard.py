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

AS_THEY_ARE = "signed"  # the readout that leaves scores so
CHOSEN = "chosen"  # the setting that says how values of others were found, which follow from the settings


@dataclass(frozen=True)
class Row:
    """What there is to say of some scores and a readout of them.

    Attributes:
        name: of the file, or what stands for several.
        method, settings: of the scores; without a setting whose value was chosen.
        readout: its name; "signed" of scores that are not plain, which are judged as they are.
        groups: the score over each group of queries; without those of which the scores have not all queries.
        tuned: how the value of a setting was chosen, see :attr:`pyattr.evaluation.Tuned.label`; empty: nothing was chosen.
        chosen: the setting with its value, or several in the order of the folds, for each group.
        curves: for each group the mean LDS of each value that there was to choose from.
        plain: whether readouts are of these scores, see :attr:`pyattr.evaluation.Scores.plain`.
    """

    name: str
    method: str
    settings: dict
    readout: str
    groups: dict[str, LDS]
    tuned: str = ""
    chosen: dict[str, dict] = field(default_factory=dict)
    curves: dict[str, dict] = field(default_factory=dict)
    plain: bool = True

    def settings_in(self, group: str) -> dict:
        """The settings of the scores of a group, with what was chosen for it."""
        return {**self.settings, **self.chosen.get(group, {})}


@dataclass(frozen=True)
class Scoreboard:
    """How scores are judged.

    A readout is of plain scores. Those without a sign, and those that were read out already, are judged once, as they are,
    where "signed" is among the readouts: their squares would be squares of squares.

    Attributes:
        truth: the ground truth.
        target: which of its losses.
        readouts: functions of scores [Q, N] by name; see :class:`pyattr.attribution.readouts.Readout`. "signed" is the scores
            as they are.
        groups: columns of the ground truth's queries by name.
        level: of the intervals.
    """

    truth: GroundTruth
    target: str
    readouts: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    groups: Mapping[str, np.ndarray]
    level: float = 0.95

    def rows(self, name: str, scores: Scores) -> list[Row]:
        """Of one method's scores, a row for each readout; of scores that are not plain one, or none.

        Raises:
            ValueError: the scores are of other training images or queries.

        Extra memory: 32 M Q bytes for each readout stay.
        """
        columns = scores.rows_in(self.truth)
        outputs = self.truth.outputs(self.target)[:, columns]
        found = []
        for readout, function in self._readouts_of(scores).items():
            score = lds(function(scores.matrix), self.truth.masks, outputs, level=self.level)
            score.standard_error, score.bootstrap  # noqa: B018  the groups share what these compute
            groups = {group: score.take(rows) for group, rows in self._rows_of_groups(columns).items()}
            found.append(Row(name, scores.method, scores.settings, readout, groups, plain=scores.plain))
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
        settings = other_settings(first.settings, setting)
        rows = []
        for readout, function in self._readouts_of(first).items():
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
                    first.plain,
                )
            )
        return rows

    def _readouts_of(self, scores: Scores) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        return {name: function for name, function in self.readouts.items() if scores.plain or name == AS_THEY_ARE}

    def _rows_of_groups(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        """By group the rows of scores for these columns; of the groups that are among them as a whole."""
        place = {int(column): row for row, column in enumerate(columns)}
        return {
            name: np.array([place[int(column)] for column in group])
            for name, group in self.groups.items()
            if all(int(column) in place for column in group)
        }


def other_settings(settings: dict, setting: str) -> dict:
    """What decides scores besides a setting: values that follow from the settings do not count for themselves."""
    chosen = _chosen(settings)
    return {
        name: f"{CHOSEN} {chosen[name]}" if name in chosen else value
        for name, value in settings.items()
        if name != setting and not (chosen and name == CHOSEN)
    }


def _chosen(settings: dict) -> dict:
    """How values of settings were found, by their names."""
    told = settings.get(CHOSEN)
    return told if isinstance(told, dict) else {}


def distinguishing(rows: Sequence[Row], *, group: str | None = None) -> dict[tuple[str, str], str]:
    """By name and readout, the settings in which the rows that have them are not all alike, in words; and how one was tuned.

    What was chosen for the group is told always, of several values in the order of the folds; how a value was chosen by the
    method itself, where that is not alike either.

    Args:
        rows: any.
        group: of queries, for which values may have been chosen.
    """
    # A value that was tuned may be another for each readout.
    told = {(row.name, row.readout): _words(row.settings if group is None else row.settings_in(group)) for row in rows}
    values: dict[str, set[str]] = {}
    ways: dict[str, set[str]] = {}
    for settings in told.values():
        for key, (word, way) in settings.items():
            values.setdefault(key, set()).add(word)
            ways.setdefault(key, set()).add(way)
    found = {}
    for row in rows:
        settings = told[row.name, row.readout]
        words = [
            f"{key}={word}{way if len(ways[key]) > 1 else ''}"
            for key, (word, way) in settings.items()
            if len(values[key]) > 1 or key in row.chosen.get(group, {})
        ]
        found[row.name, row.readout] = ", ".join([*words, row.tuned] if row.tuned else words)
    return found


def _words(settings: dict) -> dict[str, tuple[str, str]]:
    """Of each setting its value, and in parentheses how it was chosen, if it was."""
    chosen = _chosen(settings)
    return {
        name: (_word(value), f" ({CHOSEN} {chosen[name]})" if name in chosen else "")
        for name, value in settings.items()
        if not (chosen and name == CHOSEN)
    }


def _word(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, float) for each in value):
        return f"[{', '.join(f'{each:g}' for each in value)}]"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
