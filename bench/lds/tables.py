"""The tables of the benchmark in the documents, and its picture: ``python -m bench.lds tables cifar2``.

What stands between ``<!-- lds:PROBLEM -->`` (also ``PROBLEM short`` and the others of :func:`fill`) and ``<!-- end -->`` is
made anew from the committed ground truth and scores.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from pyattr.attribution.readouts import Readout
from pyattr.evaluation import LDS, GroundTruth, LDSDifference, Scores
from pyattr.evaluation.scoreboard import Row, Scoreboard
from pyattr.files import whole_file
from pyattr.report.lds import lds_bars

from ..machine import ROOT
from . import ablation_tables, costs, deletion
from .problem import Problem
from .scores import GROUPS, parts

PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("lds-benchmark", "attribution")))
PICTURES = ROOT / "docs" / "images"
ALL = "all"
# By file: the order of the published benchmarks, and what stands against it at few timesteps.
CHANCE = ("trak-10", "trak-100")
PAIRS = (
    ("d-trak-10", "trak-10"),
    ("d-trak-100", "trak-100"),
    ("d-trak-10-tuned", "trak-10-tuned"),
    ("d-trak-100-tuned", "trak-100-tuned"),
    ("trak-100-tuned", "raw-pixel-cosine"),
    ("d-trak-100-tuned", "raw-pixel-cosine"),
    ("trak-100-tuned", "raw-pixel-cosine-centred"),
    ("d-trak-100-tuned", "raw-pixel-cosine-centred"),
    ("d-trak-100-tuned", "nda"),
)
READOUTS = {
    "signed": Readout("signed"),
    "squared": Readout("squared"),
    "signed_squared": Readout("signed_squared"),
    "head": Readout("head", 5.0),
}
TARGETS = ("simple", "elbo", "square", "l1", "linf")
# Of the README.
SHORT = (
    "raw pixel, cosine",
    "gradient dot",
    "TracInCP",
    "TRAK",
    "TRAK, tuned",
    "Journey TRAK",
    "D-TRAK",
    "D-TRAK, tuned",
    "NDA",
)
READ_OUT = (
    "gradient dot",
    "TracInCP",
    "TRAK",
    "TRAK, tuned",
    "D-TRAK",
    "D-TRAK, tuned",
    "DAS, before its square, tuned",
)


def judged(problem: Problem) -> list[Row]:
    """A row for each file of scores and readout."""
    board = _board(problem, "simple", READOUTS)
    return [row for path in _files(problem) for row in board.rows(path.stem, Scores.open(path))]


def _files(problem: Problem) -> list[Path]:
    return sorted((problem.folder / "scores").glob("*.safetensors"))


def _board(problem: Problem, target: str, readouts: Mapping[str, Readout]) -> Scoreboard:
    truth = GroundTruth.open(problem.folder / "evaluation.safetensors")
    every = np.arange(len(truth.query_ids))
    groups = {**{name: every[part] for name, part in zip(GROUPS, parts(), strict=True)}, ALL: every}
    return Scoreboard(truth, target, readouts, groups)


def table(rows: list[Row], names: tuple[str, ...] | None = None) -> str:
    """In percent with 95% intervals, the best for validation images first; the best of a column is bold."""
    chosen = [row for row in rows if row.readout == "signed" and (names is None or row.method in names)]
    best = {group: max(_mean(row, group) for row in chosen) for group in GROUPS}
    lines = ["| method | K | validation | generated |", "|---|---:|---:|---:|"]
    for row in sorted(chosen, key=lambda row: (-_mean(row, "validation"), row.name)):
        cells = []
        for group in GROUPS:
            text = _cell(row.groups.get(group), True)
            cells.append(f"**{text}**" if _mean(row, group) == best[group] else text)
        lines.append(f"| {row.method} | {row.settings.get('timesteps', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def readouts(rows: list[Row]) -> str:
    """Of methods whose scores have a sign: other functions of the same scores."""
    by_file: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.method in READ_OUT:
            by_file.setdefault(row.name, {})[row.readout] = row
    words = {"signed": "signed", "squared": "squared", "signed_squared": "signed squares", "head": "largest 5%"}
    heads = " | ".join(f"{words[readout]}, {group}" for readout in READOUTS for group in GROUPS)
    lines = [f"| method | K | {heads} |", "|---|---:|" + "---:|" * (len(READOUTS) * len(GROUPS))]
    for found in by_file.values():
        first = found["signed"]
        cells = [_cell(found[readout].groups.get(group), False) for readout in READOUTS for group in GROUPS]
        lines.append(f"| {first.method} | {first.settings.get('timesteps', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(row: Row, group: str) -> float:
    return row.groups[group].mean if group in row.groups else -np.inf


def differences(rows: list[Row]) -> str:
    """Of pairs of methods on the same subsets, with what TRAK is above chance."""
    signed = {row.name: row for row in rows if row.readout == "signed"}
    lines = ["| | validation | generated | all |", "|---|---:|---:|---:|"]
    for name in CHANCE:
        lines.append(_difference_line(f"{_told(signed[name])} above chance", signed[name].groups))
    for first, second in PAIRS:
        one, other = signed[first], signed[second]
        found = {group: one.groups[group].minus(other.groups[group]) for group in (*GROUPS, ALL)}
        lines.append(_difference_line(f"{_told(one)} above {_told(other)}", found))
    return "\n".join(lines)


def targets(problem: Problem) -> str:
    """The score for each function of the loss, of the methods of the README, validation and generated queries."""
    boards = [_board(problem, target, {"signed": READOUTS["signed"]}) for target in TARGETS]
    heads = " | ".join(f"{target}, {group}" for target in TARGETS for group in GROUPS)
    lines = [f"| method | K | {heads} |", "|---|---:|" + "---:|" * (len(TARGETS) * len(GROUPS))]
    for path in _files(problem):
        scores = Scores.open(path)
        if scores.method in SHORT:
            rows = [board.rows(path.stem, scores)[0] for board in boards]
            cells = [_cell(row.groups.get(group), False) for row in rows for group in GROUPS]
            lines.append(f"| {scores.method} | {scores.settings.get('timesteps', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reliability(problem: Problem) -> str:
    """How well the losses of one model of each subset rank those of another, and what that allows a perfect method."""
    truth = GroundTruth.open(problem.folder / "evaluation.safetensors")
    losses = truth.losses[truth.targets.index("simple")].mean(2)  # [M, S, Q]
    if losses.shape[1] < 2:
        return ""
    lines = ["| | validation | generated |", "|---|---:|---:|"]
    agreement = [_agreement(losses[:, 0, part], losses[:, 1, part]) for part in parts()]
    both = [2 * value / (1 + value) for value in agreement]
    for what, values in (
        ("rank correlation of two models of the same subsets", agreement),
        ("expected of two such means of two (Spearman, Brown)", both),
        ("about the most that any method can reach: its root", [value**0.5 for value in both]),
    ):
        lines.append(f"| {what} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return "\n".join(lines)


def _agreement(first: np.ndarray, second: np.ndarray) -> float:  # [M, Q]
    return float(np.mean([spearmanr(a, b).statistic for a, b in zip(first.T, second.T, strict=True)]))


def _told(row: Row) -> str:
    timesteps = row.settings.get("timesteps")
    return row.method if timesteps is None else f"{row.method}, K={timesteps}"


def _difference_line(what: str, found: Mapping[str, LDS | LDSDifference]) -> str:
    cells = []
    for group in (*GROUPS, ALL):
        low, high = found[group].interval
        cells.append(f"{100 * found[group].mean:.1f} ({100 * low:.1f} to {100 * high:.1f})")
    return f"| {what} | {' | '.join(cells)} |"


def _cell(score: LDS | None, with_interval: bool) -> str:
    if score is None:
        return "–"
    low, high = score.interval
    interval = f" ({100 * low:.1f} to {100 * high:.1f})" if with_interval else ""
    return f"{100 * score.mean:.1f}{interval}"


def fill(page: str, problem: Problem, rows: list[Row]) -> str:
    """The page with the problem's tables made anew."""
    filled = {
        problem.name: table(rows),
        f"{problem.name} short": table(rows, SHORT),
        f"{problem.name} readouts": readouts(rows),
        f"{problem.name} differences": differences(rows),
        f"{problem.name} targets": targets(problem),
        f"{problem.name} reliability": reliability(problem),
        f"{problem.name} cells": ablation_tables.cells(problem),
        f"{problem.name} sizes": ablation_tables.sizes(problem),
        f"{problem.name} ablations": ablation_tables.changes(problem),
        f"{problem.name} deletion": deletion.table(problem),
        f"{problem.name} costs": costs.table(problem),
    }
    for name, lines in filled.items():
        pattern = re.compile(f"(<!-- lds:{name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        page = pattern.sub(lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", page)
    return page


def update(problem: Problem) -> None:
    """Rewrite the pages and the picture."""
    rows = judged(problem)
    for page in PAGES:
        text = fill(page.read_text(), problem, rows)
        with whole_file(page) as stream:
            stream.write(text.encode())
    bars = {}
    for row in rows:
        if row.readout == "signed" and row.method in SHORT:
            bars[_told(row)] = {name: score for name, score in row.groups.items() if name != ALL}
    lds_bars(PICTURES / f"lds-{problem.name}.png", bars, GROUPS)
    ablation_tables.pictures(problem, PICTURES)
    deletion.pictures(problem, PICTURES)
