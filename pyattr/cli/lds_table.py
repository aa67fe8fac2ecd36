"""What `pyattr evaluate lds` prints, writes and draws."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..attribution.readouts import Readout
from ..evaluation import GroundTruth
from ..evaluation.scoreboard import Row, Scoreboard, distinguishing, other_settings
from ..files import file_kind
from ..report.grid import matplotlib
from ..report.numbers import write_results
from .display import Display
from .lds_pictures import draw
from .options import readout_word
from .score_files import ARCHIVE, ScoreFile, score_files, without_readout
from .workspace import WorkspaceError, check_writable, named_file, read_json

TRUTH, SCORES, QUERIES, IMAGES = "evaluation.safetensors", "scores", "queries.json", "images.npz"
WIDTH = 180  # of a table that goes to a file


@dataclass(frozen=True)
class Found:
    """What there is to judge.

    Attributes:
        truth: the file of the ground truth.
        files: of scores, by the name of the row.
        queries: JSON with ranges of queries, or None.
        images: an .npz with the images, or None.
        named: those of them that the user named, not the folder they lie in.
    """

    truth: Path
    files: dict[str, ScoreFile]
    queries: Path | None
    images: Path | None
    named: tuple[Path | None, ...]


@dataclass(frozen=True)
class Asked:
    """What of it is to be shown; see the options of the command. No targets: the simple loss, or the first there is."""

    targets: tuple[str, ...]
    readouts: tuple[str, ...]
    percent: float
    against: str | None
    tune: str | None
    on_benchmark: bool
    json: Path | None
    plots: Path | None


def found(places: Sequence[Path], truth: Path | None, queries: Path | None) -> Found:
    """The files that arguments name.

    Raises:
        WorkspaceError: they name nothing that could be judged; the message says what to give.
    """
    if truth is not None:
        if not places:
            raise WorkspaceError("no scores to judge: give files of scores after --truth FILE")
        return Found(truth, _files([(_row(place), _file(place)) for place in places]), queries, None, (truth, queries))
    if len(places) != 1 or not places[0].is_dir():
        given = ", ".join(map(str, places)) if places else "nothing"
        raise WorkspaceError(
            f"give a folder that holds {TRUTH} and {SCORES}/, as in `pyattr evaluate lds FOLDER`, "
            f"or --truth FILE and files of scores; got {given}"
        )
    folder = places[0]
    if not (folder / TRUTH).is_file():
        raise WorkspaceError(f"{folder} holds no {TRUTH}: make it by `pyattr evaluate lds build {folder} ...`")
    home = folder / SCORES
    paths = sorted(path for path in home.rglob("*") if path.suffix in (".safetensors", ".npz"))
    named = [(str(path.relative_to(home).with_suffix("")), path) for path in paths]
    if (folder / ARCHIVE).is_file():
        named.append((_row(folder), folder / ARCHIVE))
    if not named:
        raise WorkspaceError(
            f"{folder} holds no scores: run `pyattr attribute --out {folder}`, or keep some in {home} by "
            "pyattr.evaluation.Scores.save"
        )
    ranges = queries or (folder / QUERIES if (folder / QUERIES).is_file() else None)
    images = folder / IMAGES if (folder / IMAGES).is_file() else None
    return Found(folder / TRUTH, _files(named), ranges, images, (queries,))


def _file(place: Path) -> Path:
    """The file of scores, in an output folder of `pyattr attribute` its archive."""
    return place / ARCHIVE if place.is_dir() else place


def _row(place: Path) -> str:
    """What rows are called after a file, or after a folder."""
    if place.is_dir() or place.name == ARCHIVE:
        return _file(place).resolve().parent.name
    return place.stem


def _files(named: Sequence[tuple[str, Path]]) -> dict[str, ScoreFile]:
    files: dict[str, ScoreFile] = {}
    for name, path in named:
        new = score_files(path, name)
        if files.keys() & new.keys():
            raise WorkspaceError("files of scores must have names of their own, since rows are named by them")
        files |= new
    return files


def table(there_is: Found, asked: Asked, threads: int | None) -> None:
    """Print a table for each target and group of queries; write numbers and pictures where they are asked for."""
    if asked.json is not None:
        check_writable("--json", asked.json)
    if asked.plots is not None:
        matplotlib()
        check_writable("--plots", asked.plots, folder=True)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    readouts = {name: Readout(name, asked.percent if name == "head" else None) for name in asked.readouts}
    truth = _truth(there_is)
    targets = asked.targets or (("simple",) if "simple" in truth.targets else truth.targets[:1])
    for target in targets:
        if target not in truth.targets:
            raise WorkspaceError(
                f"--target must be one of {', '.join(truth.targets)} of {there_is.truth}, got {target}"
            )
    groups = _groups(there_is, len(truth.query_ids))
    results: dict[str, Any] = {"subsets": len(truth.masks), "images": truth.masks.shape[1], "targets": {}}
    for name, file in there_is.files.items():
        file.check(name, truth)
    apart = without_readout({name: file.plain for name, file in there_is.files.items()}, asked.readouts)
    with Display(console) as display:
        boards = []
        for target in targets:
            board = Scoreboard(truth, target, readouts, groups)
            rows = _rows(board, there_is, asked, display)
            boards.append((board, rows, {name: _reference(name, rows, asked) for name in groups}))
    for board, rows, references in boards:
        results["targets"][board.target] = {}
        for name in groups:
            if any(name in row.groups for row in rows):
                console.print(_table(board, name, rows, references[name]))
            results["targets"][board.target][name] = _numbers(name, rows, references[name])
    for row in _first(boards[0][1]):
        if not row.groups:
            told = f"{row.name} is in no table: its queries are not all of {' or '.join(groups)}"
            console.print(told, highlight=False, soft_wrap=True)
    if apart:
        console.print(apart, highlight=False, soft_wrap=True)
    console.print(
        "LDS in percent, 95% interval by the jackknife over subsets; published: mean and standard deviation of 64 resamples.",
        highlight=False,
    )
    if asked.json is not None:
        write_results(asked.json, results)
        console.print(f"numbers  {asked.json}", highlight=False, soft_wrap=True)
    if asked.plots is not None:
        judged = [(board, rows) for board, rows, _ in boards]
        for path in draw(asked.plots, judged, there_is.files, there_is.images):
            console.print(f"picture  {path}", highlight=False, soft_wrap=True)


def _truth(there_is: Found) -> GroundTruth:
    wanted = "--truth must be a ground truth, as `pyattr evaluate lds build` writes it"
    with named_file(there_is.truth, wanted) if there_is.truth in there_is.named else contextlib.nullcontext():
        return GroundTruth.open(there_is.truth)


def _groups(there_is: Found, count: int) -> dict[str, np.ndarray]:
    path = there_is.queries
    if path is None:
        return {"all": np.arange(count)}
    if not path.exists():
        raise WorkspaceError(f"{path} does not exist")
    wanted = f'{path} must hold ranges of the {count} queries, as in {{"validation": [0, {count}]}}, got'
    try:
        ranges = read_json(path)
    except WorkspaceError:
        if path not in there_is.named:
            raise
        raise WorkspaceError(f"{wanted} {file_kind(path) or 'no JSON'}") from None
    if not isinstance(ranges, dict) or not ranges:
        raise WorkspaceError(f"{wanted} {json.dumps(ranges)}")
    groups = {}
    for name, given in ranges.items():
        # In Python, true and false are integers.
        whole = isinstance(given, list) and [type(end) for end in given] == [int, int]
        if not (whole and 0 <= given[0] < given[1] <= count):
            raise WorkspaceError(f"{wanted} {name} {json.dumps(given)}")
        groups[name] = np.arange(*given)
    return groups


def _rows(board: Scoreboard, there_is: Found, asked: Asked, display: Display) -> list[Row]:
    families = _families(there_is.files, asked.tune)
    rows: list[Row] = []
    display.progress(0, len(families), "score files")
    for done, (name, files) in enumerate(families.items(), 1):
        if len(files) == 1:
            rows += board.rows(name, files[0].open())
        else:
            rows += board.tuned_rows(name, asked.tune, [file.open for file in files], on_benchmark=asked.on_benchmark)
        display.progress(done, len(families), "score files")
    return rows


def _families(files: dict[str, ScoreFile], setting: str | None) -> dict[str, list[ScoreFile]]:
    """Files by the name of their row: those that differ in the setting alone share one."""
    if setting is None:
        return {name: [file] for name, file in files.items()}
    families: dict[str, list[tuple[str, ScoreFile]]] = {}
    for name, file in files.items():
        others = [file.method, file.plain, other_settings(file.settings, setting)]
        key = json.dumps(others, sort_keys=True) if setting in file.settings else name
        families.setdefault(key, []).append((name, file))
    if not any(len(members) > 1 for members in families.values()):
        raise WorkspaceError(f"--tune {setting}: no two files of scores differ in that setting alone")
    return {members[0][0]: [file for _, file in members] for members in families.values()}


def _first(rows: Sequence[Row]) -> list[Row]:
    """Of each file, or what stands for several, the row of the readout that was asked for first."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.name, row)
    return list(first.values())


def _reference(group: str, rows: Sequence[Row], asked: Asked) -> Row | None:
    """The row that differences are taken from: the one asked for, or the best of the group."""
    rows = [row for row in rows if group in row.groups]
    if asked.against is None:
        known = [row for row in rows if not np.isnan(row.groups[group].mean)]
        return max(known, key=lambda row: row.groups[group].mean, default=None)
    wanted = asked.against.lower()
    named = [row for row in _first(rows) if wanted in (row.name.lower(), row.method.lower())]
    exact = [row for row in named if row.name.lower() == wanted]
    if len(exact or named) != 1:
        names = ", ".join(sorted({row.name for row in (named or rows)}))
        what = "names several rows" if named else "names no row"
        raise WorkspaceError(f"--against {asked.against} {what} of the queries {group}: give one of {names}")
    return (exact or named)[0]


def _table(board: Scoreboard, group: str, rows: Sequence[Row], reference: Row | None) -> Table:
    shown = Table(
        title=f"{group}: {len(board.groups[group])} queries, {len(board.truth.masks)} subsets, target {board.target}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    shown.add_column("method")
    shown.add_column("settings")
    several = len(board.readouts) > 1
    for readout in board.readouts:
        prefix = f"{readout_word(readout)}\n" if several else ""
        for title in ("LDS", "95%", "published", "from the best" if reference is None else f"from {reference.name}"):
            shown.add_column(prefix + title, justify="right")
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        if group in row.groups:
            by_name.setdefault(row.name, {})[row.readout] = row
    told = distinguishing([row for row in rows if group in row.groups], group=group)

    def order(found: dict[str, Row]) -> float:
        mean = next(iter(found.values())).groups[group].mean
        return np.inf if np.isnan(mean) else -mean

    for found in sorted(by_name.values(), key=order):
        row = next(iter(found.values()))
        cells = []
        for readout in board.readouts:
            if readout not in found:
                cells += ["–", "", "", ""]
                continue
            score = found[readout].groups[group]
            low, high = score.interval
            cells += [
                f"{100 * score.mean:.1f}",
                f"{100 * low:.1f} to {100 * high:.1f}",
                f"{100 * score.bootstrap_mean:.1f} ± {100 * score.bootstrap_std:.1f}",
                _difference_text(found[readout], reference, group),
            ]
        settings = dict.fromkeys(told[row.name, readout] for readout in found)
        shown.add_row(Text(row.method), Text(" / ".join(settings)), *cells)
    return shown


def _difference_text(row: Row, reference: Row | None, group: str) -> str:
    if reference is None or row is reference:
        return ""
    difference = row.groups[group].minus(reference.groups[group])
    low, high = difference.interval
    return f"{100 * difference.mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _numbers(group: str, rows: Sequence[Row], reference: Row | None) -> list[dict]:
    """For programs, in percent."""
    told = []
    for row in rows:
        if group not in row.groups:
            continue
        score = row.groups[group]
        one = {
            "name": row.name,
            "method": row.method,
            "settings": row.settings_in(group),
            "readout": row.readout,
            "plain": row.plain,
            "queries": len(score.per_query),
            "lds": 100 * score.mean,
            "interval": [100 * end for end in score.interval],
            "published": {"mean": 100 * score.bootstrap_mean, "std": 100 * score.bootstrap_std},
        }
        if row.tuned:
            one |= {"tuned": row.tuned, "curve": [[value, 100 * mean] for value, mean in row.curves[group].items()]}
        if reference is not None and row is not reference:
            difference = score.minus(reference.groups[group])
            one["difference"] = {
                "from": reference.name,
                "readout": reference.readout,
                "lds": 100 * difference.mean,
                "interval": [100 * end for end in difference.interval],
            }
        told.append(one)
    return told
