"""From pytest-benchmark's output to recorded figures: rates, ratios between contenders of one run, goals, merging."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

STATS = ("min", "max", "mean", "median", "stddev", "iqr", "outliers", "ops", "rounds", "iterations")
PEAK = "peak of "  # before a row: its memory, not its rate


@dataclass(frozen=True)
class Goal:
    """What a benchmark is meant to reach.

    Attributes:
        table: the table whose figures it reads.
        text: the goal in words, with its number.
        measure: from ``rate(row, column)`` (None where not measured) to the measured number, or None.
        wanted: the smallest number that meets it.
        missing: why it has no number when ``measure`` gives None.
    """

    table: str
    text: str
    measure: Callable[[Callable[[str, str], float | None]], float | None]
    wanted: float
    missing: str = "not measured in this run"


def lead(above: str | Iterable[str], below: str | Iterable[str], column: str) -> Callable:
    """A goal's ``measure``: the rate of a row, or of the fastest of several, in that of another row or several."""

    def fastest(rate, rows):
        rates = [rate(row, column) for row in ([rows] if isinstance(rows, str) else rows)]
        return max((found for found in rates if found), default=None)

    def measured(rate):
        ours, theirs = fastest(rate, above), fastest(rate, below)
        return ours / theirs if ours and theirs else None

    return measured


def describe(
    seconds: float, *, work: float, unit: str, bytes: int, ceiling: tuple[str, float | None], ram: float | None
) -> dict:
    """Rates of a figure from its seconds per call, and how near they are to the machine's measured ceilings.

    Args:
        seconds: per call.
        work: operations per call, counted in ``unit``.
        unit: plural, such as "sign-adds".
        bytes: least number of bytes that a call must move to and from memory.
        ceiling: name and rate per second of the ceiling that bounds ``work``; None when it was not measured.
        ram: the ceiling of memory, bytes per second.
    """
    figures = {"unit": unit, "work": work, "work_per_s": work / seconds, "bytes": bytes, "bytes_per_s": bytes / seconds}
    name, rate = ceiling
    if rate:
        figures[f"percent_of_{name}"] = 100 * work / seconds / rate
    if ram:
        figures["percent_of_ram_read"] = 100 * bytes / seconds / ram
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in figures.items()}


def add_ratios(benchmarks: list[dict]) -> None:
    """Give each of our figures its ratio to every peer in the same table and column: 4.0 is four times the peer's rate.

    Where a table has several kinds of work, only peers of the figure's own kind are its rivals. A figure that was not timed
    through ``measure`` stands in no table and is left as it is.
    """
    for figure in benchmarks:
        info = figure["extra_info"]
        if not info.get("ours"):
            continue
        info["times_faster_than"] = {
            other["extra_info"]["row"]: float(f"{info['work_per_s'] / other['extra_info']['work_per_s']:.4g}")
            for other in benchmarks
            if other["extra_info"].get("ours") is False and _rivalry(other["extra_info"]) == _rivalry(info)
        }


def _rivalry(info: dict):
    return info["table"], info["column"], info.get("kind", "")


def check_goals(goals: Iterable[Goal], benchmarks: list[dict], ceilings: dict | None = None) -> list[dict]:
    """Each goal with what was measured, and whether that meets it (None: not measured).

    A goal reads the machine's ceilings as ``rate("ceiling", name)``, and the MiB that a figure took at most as
    ``rate(PEAK + row, column)``.
    """
    checked = []
    for goal in goals:
        rates = {
            (f["extra_info"]["row"], f["extra_info"]["column"]): f["extra_info"]["work_per_s"]
            for f in benchmarks
            if f["extra_info"].get("table") == goal.table
        }
        rates |= {
            (PEAK + f["extra_info"]["row"], f["extra_info"]["column"]): f["extra_info"]["peak_mib"]
            for f in benchmarks
            if f["extra_info"].get("table") == goal.table and "peak_mib" in f["extra_info"]
        }
        rates |= {("ceiling", name): value for name, value in (ceilings or {}).items()}
        measured = goal.measure(lambda row, column, rates=rates: rates.get((row, column)))
        entry = {"table": goal.table, "text": goal.text, "wanted": goal.wanted}
        if measured is None:
            entry |= {"measured": None, "met": None, "why": goal.missing}
        else:
            entry |= {"measured": float(f"{measured:.4g}"), "met": measured >= goal.wanted}
        checked.append(entry)
    return checked


def trim(output: dict) -> dict:
    """pytest-benchmark's output with only what is compared later; it can still be loaded by pytest-benchmark."""
    benchmarks = []
    for figure in output["benchmarks"]:
        name = figure["name"].removeprefix("test_")
        benchmarks.append(
            {
                "group": figure["group"],
                "name": name,
                "fullname": name,
                "params": None,
                "param": None,
                "extra_info": figure["extra_info"],
                "stats": {key: figure["stats"][key] for key in STATS},
            }
        )
    kept = ("machine_info", "commit_info", "datetime", "version", "goals", "skipped")
    return {**{key: output[key] for key in kept if key in output}, "benchmarks": benchmarks}


def merge(recorded: dict | None, new: dict, *, filtered: bool = False) -> dict:
    """A new run over an earlier one of the same commit: the new run's tables replace the old ones, others stay.

    Args:
        recorded: the earlier run.
        new: the later one.
        filtered: it ran only some figures of its tables, so that figure by figure is replaced.
    """
    if recorded is None:
        return new
    key = _cell if filtered else _table
    fresh = {key(figure["extra_info"]) for figure in new["benchmarks"]}
    kept = [figure for figure in recorded["benchmarks"] if key(figure["extra_info"]) not in fresh]
    known = {_text(goal) for goal in recorded.get("goals", [])}
    tables = {figure["extra_info"].get("table") for figure in new["benchmarks"]}
    # A run that lacks what a goal is about says nothing about it.
    goals = [
        goal
        for goal in new.get("goals", [])
        if goal["measured"] is not None or (goal["table"] in tables and not (filtered and _text(goal) in known))
    ]
    replaced = {_text(goal) for goal in goals}
    earlier = [
        goal
        for goal in recorded.get("goals", [])
        if _text(goal) not in replaced and (filtered or goal["table"] not in fresh)
    ]
    fresh |= {key(entry) for entry in new.get("skipped", [])} if filtered else set()
    skipped = [entry for entry in recorded.get("skipped", []) if key(entry) not in fresh]
    return {
        **new,
        "benchmarks": kept + new["benchmarks"],
        "goals": earlier + goals,
        "skipped": skipped + new.get("skipped", []),
    }


def _table(entry: dict):
    return entry.get("table")


def _cell(entry: dict):
    return entry.get("table"), entry.get("row"), entry.get("column")


def _text(goal: dict):
    return goal["table"], goal["text"]


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(temporary, "w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def disturbed(figure: dict) -> bool:
    """Whether something else ran beside a figure: its slowest round took over 1.5 times as long as its fastest."""
    return figure["stats"]["max"] > 1.5 * figure["stats"]["min"]


def is_clean(run: dict) -> bool:
    """Whether the run was of a commit, not of a tree that differs from it."""
    return not run["machine_info"]["commit"].endswith("-dirty")


def read_runs(folder: Path) -> list[tuple[Path, dict]]:
    """Recorded runs of commits under a folder, oldest first."""
    runs = [(path, json.loads(path.read_text(encoding="utf8"))) for path in sorted(folder.glob("*/*.json"))]
    runs = [run for run in runs if is_clean(run[1])]
    return sorted(runs, key=lambda run: run[1]["machine_info"]["date"])
