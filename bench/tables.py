"""The README's tables, made from the recorded runs: ``python -m bench.tables`` rewrites what stands between the markers.

``<!-- bench:NAME --> ... <!-- /bench -->`` holds the table of that name from the newest run on each machine that has it, and
``<!-- backends --> ... <!-- /backends -->`` the backends that each op declares. A marker is a line of its own.
"""

import os
import re
import sys
from pathlib import Path

from pyattr import backends

from .figures import disturbed, read_runs
from .machine import ROOT

RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
NAMES = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
_SCALES = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1.0, ""))


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _cell(figure: dict | None, best: dict[tuple[str, str], float], scale: float) -> str:
    if figure is None:
        return "–"
    info = figure["extra_info"]
    text = _number(info["work_per_s"] / scale)
    fastest = best[info["column"], info.get("kind", "")]
    if not info["ours"] and fastest:
        text += f" ({_number(fastest / info['work_per_s'])}x)"
    if "peak_mib" in info:
        text += f", {info['peak_mib']:.0f} MiB"
    if disturbed(figure):
        text += " †"
    return text


def table(run: dict, name: str) -> str:
    """One run's table: contenders down, sizes across, rates in the cells, and how many times slower each peer is."""
    figures = [f for f in run["benchmarks"] if f["extra_info"].get("table") == name]
    rows = list(dict.fromkeys(f["extra_info"]["row"] for f in figures))
    columns = list(dict.fromkeys(f["extra_info"]["column"] for f in figures))
    at = {(f["extra_info"]["row"], f["extra_info"]["column"]): f for f in figures}
    rates = [f["extra_info"]["work_per_s"] for f in figures]
    scale, prefix = next((s, p) for s, p in _SCALES if max(rates) >= s or s == 1.0)
    kinds = {f["extra_info"].get("kind", "") for f in figures}
    best = {(column, kind): 0.0 for column in columns for kind in kinds}
    for info in (figure["extra_info"] for figure in figures):
        if info["ours"]:
            place = info["column"], info.get("kind", "")
            best[place] = max(best[place], info["work_per_s"])
    rival = "pyattr's fastest row of the same kind" if len(kinds) > 1 else "pyattr's fastest backend"
    machine = run["machine_info"]
    where = [machine["cpu"]["name"], machine["cpu"]["kind"] or "", f"{machine['threads']} threads", *machine["gpus"]]
    lines = [
        f"{', '.join(filter(None, where))}; commit {machine['commit']}, {machine['date'][:10]}. In {prefix}"
        f"{figures[0]['extra_info']['unit']} per second; in brackets, how many times faster {rival} is.",
        "",
        f"| | {' | '.join(columns)} | |",
        f"|---|{'---:|' * len(columns)}---|",
    ]
    for row in rows:
        notes = dict.fromkeys(at[row, column]["extra_info"]["note"] for column in columns if (row, column) in at)
        cells = [_cell(at.get((row, column)), best, scale) for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} | {'; '.join(filter(None, notes))} |")
    if any(map(disturbed, figures)):
        lines.append("\n† disturbed: the slowest round took over 1.5 times as long as the fastest.")
    absent = dict.fromkeys((s["row"], s["reason"]) for s in run.get("skipped", []) if s["table"] == name)
    lines += [f"\nLeft out: {row}: {reason}" for row, reason in absent]
    return "\n".join(lines)


def newest(runs: list[tuple[Path, dict]], name: str) -> list[dict]:
    """The newest run of each machine that has the table."""
    found = {}
    for _, run in runs:
        if any(f["extra_info"].get("table") == name for f in run["benchmarks"]):
            found[run["machine_info"]["slug"]] = run
    return [found[slug] for slug in sorted(found)]


def backend_table() -> str:
    """Which backends each op declares, whatever this machine can run."""
    lines = [f"| op | {' | '.join(backends.NAMES)} |", f"|---|{':---:|' * len(backends.NAMES)}"]
    for op, declared in backends.report().items():
        lines.append(f"| `{op}` | {' | '.join('yes' if name in declared else '–' for name in backends.NAMES)} |")
    return "\n".join(lines)


def fill(page: str, runs: list[tuple[Path, dict]]) -> str:
    """The page with everything between its markers made anew.

    Raises:
        ValueError: a marker names a table that is none, or is not closed.
    """

    def bench(match):
        name = match.group(1)
        found = newest(runs, name)
        if not found and name not in NAMES:
            raise ValueError(f"no benchmark and no recorded run has a table {name!r}")
        text = "\n\n".join(table(run, name) for run in found) or "Not measured yet."
        return f"<!-- bench:{name} -->\n{text}\n<!-- /bench -->"

    for opened, closed in ((r"<!-- bench:\w+ -->", "<!-- /bench -->"), ("<!-- backends -->", "<!-- /backends -->")):
        counts = [len(re.findall(f"^{marker}$", page, flags=re.MULTILINE)) for marker in (opened, closed)]
        if counts[0] != counts[1]:
            raise ValueError(f"{counts[0]} lines {opened!r} but {counts[1]} lines {closed!r}")
    page = re.sub(r"^<!-- bench:(\w+) -->$.*?^<!-- /bench -->$", bench, page, flags=re.DOTALL | re.MULTILINE)
    filled = f"<!-- backends -->\n{backend_table()}\n<!-- /backends -->"
    return re.sub(r"^<!-- backends -->$.*?^<!-- /backends -->$", lambda _: filled, page, flags=re.DOTALL | re.MULTILINE)


def update(pages=PAGES, results: Path = RESULTS) -> list[Path]:
    """Rewrite the pages that change; returns them."""
    runs, changed = read_runs(results), []
    for page in pages:
        if not page.exists():
            continue
        old = page.read_text(encoding="utf8")
        try:
            new = fill(old, runs)
        except ValueError as error:
            raise ValueError(f"{page.name}: {error}") from None
        if new != old:
            temporary = page.with_name(f".{page.name}.part")
            temporary.write_text(new, encoding="utf8")
            os.replace(temporary, page)
            changed.append(page)
    return changed


if __name__ == "__main__":
    try:
        for path in update():
            print(f"rewrote the tables of {path.relative_to(ROOT)}")
    except ValueError as error:
        sys.exit(str(error))
