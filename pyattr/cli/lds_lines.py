"""The lines of `pyattr evaluate lds --plots`: of files that differ in one setting, and else in what follows from it alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from ..evaluation.scoreboard import Row, Scoreboard, distinguishing, other_settings
from ..report.lds import Line
from .options import METHODS, readout_word
from .score_files import ScoreFile

LINES = 10  # in a picture, at most


def mean(row: Row) -> float:
    """Over its groups; what is NaN comes last."""
    value = np.mean([score.mean for score in row.groups.values()]) if row.groups else np.nan
    return -np.inf if np.isnan(value) else float(value)


def panels(board: Scoreboard, rows: Sequence[Row], files: Mapping[str, ScoreFile]) -> dict[str, dict[str, list[Line]]]:
    """By setting that is a number, and group: lines of the rows that differ in it alone, the best of them."""
    settings = dict.fromkeys(name for row in rows for name, value in row.settings.items() if _is_number(value))
    found: dict[str, dict[str, list[Line]]] = {}
    for setting in settings:
        families = [
            (others, members)
            for others, members in _families(rows, files, setting)
            if len({row.settings[setting] for row in members}) > 1
        ]
        families = sorted(families, key=lambda family: -max(map(mean, family[1])))[:LINES]
        # Each stands for its family, with what its members share.
        shared = [
            dataclasses.replace(members[0], name=str(number), settings=others)
            for number, (others, members) in enumerate(families)
        ]
        told = distinguishing(shared)
        for group in board.groups:
            lines = []
            for one, (_, members) in zip(shared, families, strict=True):
                here = sorted((row for row in members if group in row.groups), key=lambda row: row.settings[setting])
                if len(here) > 1:
                    words = [
                        _method(members, files),
                        *([readout_word(one.readout)] if len(board.readouts) > 1 and one.plain else []),
                        told[one.name, one.readout],
                    ]
                    label = ", ".join(word for word in words if word)
                    lines.append(
                        Line(label, [row.settings[setting] for row in here], [row.groups[group] for row in here])
                    )
            if lines:
                found.setdefault(setting, {})[group] = lines
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _method(members: Sequence[Row], files: Mapping[str, ScoreFile]) -> str:
    """The name that rows have in common: where it holds the setting itself, the method's own."""
    names = {row.method for row in members}
    kind = files[members[0].name].kind
    return names.pop() if len(names) == 1 else METHODS.get(kind, kind)


def _families(rows: Sequence[Row], files: Mapping[str, ScoreFile], setting: str) -> list[tuple[dict, list[Row]]]:
    """Rows that are alike but for a setting, with what they are alike in."""
    alike: dict[str, tuple[dict, list[Row]]] = {}
    for row in rows:
        if _is_number(row.settings.get(setting)):
            file = files[row.name]
            for others in _others(row.settings, file, setting):
                key = json.dumps([file.kind, row.readout, row.plain, others], sort_keys=True)
                alike.setdefault(key, (others, []))[1].append(row)
    found = list(alike.values())
    return [each for family in found for each in _nested(*family, files)] if setting == "models" else found


def _others(settings: dict, file: ScoreFile, setting: str) -> list[dict]:
    """What else rows may be alike in: a model follows from its step, and a query's noise draws may be those of an image."""
    others = other_settings(settings, setting)
    if setting == "step" and file.training:
        others.pop("model", None)
        others["training"] = _short(file.training)
    if setting == "models" and file.models:
        others.pop("model", None)
        others.pop("step", None)
    if setting == "num_noises" and settings.get("query_noises") == settings["num_noises"]:
        return [others, {**others, "query_noises": "num_noises"}]
    return [others]


def _nested(others: dict, members: list[Row], files: Mapping[str, ScoreFile]) -> list[tuple[dict, list[Row]]]:
    """Of ensembles those of which each larger one has the models of the smaller, in their order, and others after them."""
    models = {row.name: files[row.name].models for row in members}
    if not any(models.values()):
        return [(others, members)]
    found = []
    for whole in dict.fromkeys(models.values()):
        if not any(len(other) > len(whole) and other[: len(whole)] == whole for other in models.values()):
            part = [row for row in members if whole[: len(models[row.name])] == models[row.name]]
            found.append(({**others, "model": _short(whole)}, part))
    return found


def _short(told: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
