"""The tables of the benchmark in the documents, and its picture: ``python -m bench.lds tables cifar2``.

What stands between ``<!-- lds:PROBLEM -->`` (also ``PROBLEM short``, ``differences``, ``ablations``) and ``<!-- end -->`` is
made anew from the committed ground truth and scores.
"""

import json
import re
from collections.abc import Mapping

import numpy as np

from pyattr.attribution.readouts import Readout
from pyattr.evaluation import LDS, GroundTruth, LDSDifference, Scores
from pyattr.evaluation.scoreboard import Row, Scoreboard
from pyattr.files import whole_file
from pyattr.report.lds import lds_bars

from ..machine import ROOT
from .problem import Problem
from .scores import parts

PAGES = (ROOT / "README.md", ROOT / "docs" / "lds-benchmark.md")
PICTURES = ROOT / "docs" / "images"
GROUPS, ALL = ("validation", "generated"), "all"
# By file: the order of the published benchmarks, and what stands against it here.
PAIRS = (("d-trak-10", "trak-10"), ("d-trak-10-tuned", "trak-10-tuned"), ("raw-pixel-cosine", "d-trak-10-tuned"))
READOUTS = {"signed": Readout("signed"), "squared": Readout("squared"), "signed_squared": Readout("signed_squared")}
USUAL = ("timesteps", "D")  # settings that all of these ablations share
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


def judged(problem: Problem) -> list[Row]:
    """A row for each file of scores and readout."""
    truth = GroundTruth.open(problem.folder / "evaluation.safetensors")
    every = np.arange(len(truth.query_ids))
    groups = {**{name: every[part] for name, part in zip(GROUPS, parts(), strict=True)}, ALL: every}
    board = Scoreboard(truth, "simple", READOUTS, groups)
    files = sorted((problem.folder / "scores").glob("*.safetensors"))
    return [row for path in files for row in board.rows(path.stem, Scores.open(path))]


def table(rows: list[Row], readouts: tuple[str, ...], names: tuple[str, ...] | None = None) -> str:
    """In percent with 95% intervals, the best for validation images first; the best of a column is bold."""
    by_file: dict[str, dict[str, Row]] = {}
    for row in rows:
        if names is None or row.method in names:
            by_file.setdefault(row.name, {})[row.readout] = row
    columns = [(readout, group) for readout in readouts for group in GROUPS]
    means = {
        (name, (readout, group)): found[readout].groups[group].mean if group in found[readout].groups else -np.inf
        for name, found in by_file.items()
        for readout, group in columns
    }
    best = {column: max(means[name, column] for name in by_file) for column in columns}
    words = {"signed": "", "squared": ", squares", "signed_squared": ", signed squares"}
    lines = [
        "| method | K | " + " | ".join(f"{group}{words[readout]}" for readout, group in columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for name in sorted(by_file, key=lambda name: (-means[name, ("signed", "validation")], name)):
        found, cells = by_file[name], []
        for readout, group in columns:
            text = _cell(found[readout].groups.get(group), readout == "signed")
            cells.append(f"**{text}**" if means[name, (readout, group)] == best[readout, group] else text)
        first = found["signed"]
        lines.append(f"| {first.method} | {first.settings.get('timesteps', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(rows: list[Row]) -> str:
    """Of pairs of methods on the same subsets, with what TRAK is above chance."""
    signed = {row.name: row for row in rows if row.readout == "signed"}
    lines = ["| | validation | generated | all |", "|---|---:|---:|---:|"]
    trak = signed["trak-10"]
    lines.append(_difference_line(f"{trak.method} above chance", trak.groups))
    for first, second in PAIRS:
        one, other = signed[first], signed[second]
        found = {group: one.groups[group].minus(other.groups[group]) for group in (*GROUPS, ALL)}
        lines.append(_difference_line(f"{one.method} above {other.method}", found))
    return "\n".join(lines)


def ablations(problem: Problem) -> str:
    """Of what was ablated: LDS at the lambda that is best for other queries."""
    lines = ["| method | changed | validation | generated |", "|---|---|---:|---:|"]
    for path in sorted((problem.folder / "ablations").glob("*.json")):
        for found in json.loads(path.read_text()):
            changed = ", ".join(f"{name} {value}" for name, value in found["settings"].items() if name not in USUAL)
            cells = []
            for group in GROUPS:
                low, high = found[group]["interval"]
                cells.append(f"{found[group]['lds']:.1f} ({low:.1f} to {high:.1f})")
            lines.append(f"| {found['method']} | {changed} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
        problem.name: table(rows, tuple(READOUTS)),
        f"{problem.name} short": table(rows, ("signed",), SHORT),
        f"{problem.name} differences": differences(rows),
        f"{problem.name} ablations": ablations(problem),
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
        if row.readout == "signed":
            timesteps = row.settings.get("timesteps")
            shown = {name: score for name, score in row.groups.items() if name != ALL}
            bars[row.method if timesteps is None else f"{row.method}, K={timesteps}"] = shown
    lds_bars(PICTURES / f"lds-{problem.name}.png", bars, GROUPS)
