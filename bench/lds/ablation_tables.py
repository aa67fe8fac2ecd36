"""What the ablations found, as tables and pictures."""

import json
import math
from pathlib import Path

from pyattr.report.lds import Line, lds_lines

from . import problem as settings
from .ablations import PUBLISHED
from .methods import DIM, LAMBDAS
from .problem import Problem

QUERIES = ("validation", "generated")
SIZES = ("sizes", "large")
OWN = (*SIZES, "cells")  # groups with a table of their own
USUAL = ("timesteps", "D")  # settings that all of the other ablations share
# Drawn as lines: the setting, its name for people, and the value that it has in the ablation of sizes, if any.
DRAWN = (
    ("eta", "eta", None),
    ("checkpoint", "steps of training", settings.FULL_STEPS),
    ("num_noises", "draws of the noise", 1),
    ("half models", "models of halves", None),
)


def found(problem: Problem, groups: tuple[str, ...] | None = None) -> list[dict]:
    """The variants of the groups that were run, or of all that have no table of their own."""
    paths = sorted((problem.folder / "ablations").glob("*.json"))
    wanted = [path for path in paths if (path.stem in groups if groups else path.stem not in OWN)]
    return [entry for path in wanted for entry in json.loads(path.read_text())["variants"]]


def changes(problem: Problem) -> str:
    """One setting changed: LDS at the lambda that is best for other queries."""
    lines = ["| method | changed | validation | generated |", "|---|---|---:|---:|"]
    for entry in found(problem):
        changed = ", ".join(f"{name} {value}" for name, value in entry["settings"].items() if name not in USUAL)
        lines.append(f"| {entry['method']} | {changed or 'nothing'} | {_cells(entry)} |")
    return "\n".join(lines)


def cells(problem: Problem) -> str:
    """Similarity of pixels, by what of them is looked at."""
    lines = ["| similarity | of | validation | generated |", "|---|---|---:|---:|"]
    for entry in found(problem, ("cells",)):
        what = ", ".join(f"{word} {value}" for word, value in entry["settings"].items()) or "all pixels"
        lines.append(f"| {entry['method'].removeprefix('raw pixel, ')} | {what} | {_cells(entry)} |")
    return "\n".join(lines)


def sizes(problem: Problem) -> str:
    """Timesteps, dimensions, kinds of projection and arithmetic."""
    lines = ["| method | K | D | | validation | generated |", "|---|---:|---:|---|---:|---:|"]
    for entry in found(problem, SIZES):
        told = dict(entry["settings"])
        timesteps, dim = (told.pop(name) for name in USUAL)
        more = ", ".join(f"{value} {name}" for name, value in told.items())
        lines.append(f"| {entry['method']} | {timesteps} | {dim} | {more} | {_cells(entry)} |")
    return "\n".join(lines)


def pictures(problem: Problem, folder: Path) -> None:
    """LDS against the number of timesteps, the dimension and lambda."""
    plain = [entry for entry in found(problem, ("sizes",)) if set(entry["settings"]) == set(USUAL)]
    if not plain:
        return
    by_setting = {
        "timesteps": [entry for entry in plain if entry["settings"]["D"] == DIM],
        "D": [entry for entry in plain if entry["settings"]["timesteps"] == PUBLISHED[0]],
    }
    for setting, entries in by_setting.items():
        points = [(entry, entry["settings"][setting]) for entry in entries]
        lds_lines(folder / f"lds-{problem.name}-{setting.lower()}.png", _panels(points), setting)
    usual = [entry for entry in plain if entry["settings"] == {"timesteps": PUBLISHED[0], "D": DIM}]
    for setting, words, value in DRAWN:
        points = [
            (entry, entry["settings"][setting])
            for entry in found(problem)
            if set(entry["settings"]) == {*USUAL, setting}
        ]
        if points and value is not None:
            points = sorted([*points, *((entry, value) for entry in usual)], key=lambda point: point[1])
        if points:
            name = f"lds-{problem.name}-{setting.replace('_', '-').replace(' ', '-')}.png"
            lds_lines(folder / name, _panels(points), words)
    shown = [entry for entry in plain if entry["settings"]["timesteps"] in PUBLISHED and entry["settings"]["D"] == DIM]
    curves = {
        group: [
            Line(
                f"{entry['method']}, K={entry['settings']['timesteps']}",
                LAMBDAS,
                [(math.nan if mean is None else mean, math.nan, math.nan) for mean in entry[group]["curve"].values()],
            )
            for entry in shown
        ]
        for group in QUERIES
    }
    lds_lines(folder / f"lds-{problem.name}-lambda.png", curves, "lambda over the largest eigenvalue")


def _panels(points: list[tuple[dict, float]]) -> dict[str, list[Line]]:
    """Of variants and the values of the setting in which they differ, a line for each method in each group of queries."""
    panels: dict[str, list[Line]] = {}
    for group in QUERIES:
        for method in dict.fromkeys(entry["method"] for entry, _ in points):
            mine = [(entry[group], value) for entry, value in points if entry["method"] == method]
            scores = [(score["lds"], *score["interval"]) for score, _ in mine]
            panels.setdefault(group, []).append(Line(method, [value for _, value in mine], scores))
    return panels


def _cells(entry: dict) -> str:
    return " | ".join(_cell(entry[group]) for group in QUERIES)


def _cell(score: dict) -> str:
    if score["lds"] is None:
        return "–"
    low, high = score["interval"]
    return f"{score['lds']:.1f} ({low:.1f} to {high:.1f})"
