"""``python -m bench.compare``: each figure against the last recorded run on the same kind of machine, ratios first.

Takes the recorded run of the present commit where there is one, else runs the benchmarks now (without recording them).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __main__ as bench
from . import figures, machine, tables

THRESHOLD = 0.10  # a slow-down by less is noise on a shared machine


def last_run(new: dict, runs: list[tuple[Path, dict]]) -> tuple[Path, dict] | None:
    """The newest run on the same kind of machine, of another commit and not later than the new one."""
    here = new["machine_info"]
    found = [
        (path, run)
        for path, run in runs
        if run["machine_info"]["slug"] == here["slug"]
        and run["machine_info"]["commit"] != here["commit"]
        and run["machine_info"]["date"] <= here["date"]
    ]
    return found[-1] if found else None


def speed(new: dict, old: dict, key: str = "median") -> float:
    """How many times as much work a second a figure does as before; the two may be of different shapes."""
    return new["extra_info"]["work"] / new["stats"][key] / (old["extra_info"]["work"] / old["stats"][key])


def slower(new: dict, old: dict, threshold: float = THRESHOLD) -> bool:
    """Whether a figure got slower by more than the threshold, in its median and in its fastest round both."""
    return all(1 / speed(new, old, key) > 1 + threshold for key in ("median", "min"))


def compare(new: dict, old: dict, threshold: float = THRESHOLD) -> list[dict]:
    """Figures of both runs: speed of the new one over the old, ratios to peers in both, and whether it got slower."""
    before = {figure["fullname"]: figure for figure in old["benchmarks"]}
    rows = []
    for figure in new["benchmarks"]:
        other = before.get(figure["fullname"])
        if other is None:
            continue
        ratios = other["extra_info"].get("times_faster_than", {})
        rows.append(
            {
                "name": figure["fullname"],
                "ours": figure["extra_info"].get("ours", True),
                "speed": speed(figure, other),
                "shapes": (other["extra_info"].get("shape"), figure["extra_info"].get("shape")),
                "peers": {
                    peer: (ratios[peer], ratio)
                    for peer, ratio in figure["extra_info"].get("times_faster_than", {}).items()
                    if peer in ratios
                },
                "before": other["stats"]["median"],
                "now": figure["stats"]["median"],
                "slower": slower(figure, other, threshold),
            }
        )
    return rows


def show(rows: list[dict], console: Console) -> None:
    """Ratios first: our speed against before, then our lead over each peer before and now, then seconds and other shapes."""
    table = Table("figure", "speed, now / before", "times faster than a peer: before -> now", "seconds: before -> now")
    for row in sorted(rows, key=lambda row: (not row["ours"], row["speed"])):
        ratio = f"{row['speed']:.2f}" + (" SLOWER" if row["slower"] and row["ours"] else "")
        ratios = "\n".join(f"{peer}: {a:.3g} -> {b:.3g}" for peer, (a, b) in row["peers"].items())
        seconds = f"{row['before']:.4g} -> {row['now']:.4g}"
        before, now = row["shapes"]
        if before != now:
            seconds += f"\n{_shape(before)} -> {_shape(now)}"
        # A name holds brackets, which rich would take for markup.
        table.add_row(Text(row["name"]), ratio, ratios, seconds)
    console.print(table)


def _shape(shape: dict | None) -> str:
    return ", ".join(f"{name}={size}" for name, size in (shape or {"shape": "?"}).items())


def show_machine(new: dict, old: dict, console: Console) -> None:
    """The ceilings of both runs: a machine that was busy this time explains a slow-down everywhere."""
    now, before = new["machine_info"].get("ceilings", {}), old["machine_info"].get("ceilings", {})
    for name in ("adds_per_s", "fmas_per_s", "ram_read_bytes_per_s"):
        if now.get(name) and before.get(name):
            console.print(
                f"machine: {name} {before[name]:.3g} -> {now[name]:.3g}, {now[name] / before[name]:.2f} of before"
            )


def present_run(names: list[str]) -> tuple[Path | None, dict]:
    """The recorded run of this commit, or a fresh one."""
    here = machine.describe()
    path = tables.RESULTS / here["slug"] / f"{here['commit']}.json"
    if not names and path.exists() and not here["commit"].endswith("-dirty"):
        return path, json.loads(path.read_text(encoding="utf8"))
    return None, bench.run(names)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="run these benchmarks now and compare them alone")
    parser.add_argument("--fail", action="store_true", help="exit with status 1 when one of our figures got slower")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="slower by this share counts (default 0.10)")
    arguments = parser.parse_args()
    console = Console(width=160)
    path, new = present_run(arguments.names)
    found = last_run(new, figures.read_runs(tables.RESULTS))
    if found is None:
        sys.exit(f"bench.compare: no earlier run is recorded for {new['machine_info']['slug']}: run `make bench`")
    old_path, old = found
    rows = compare(new, old, arguments.threshold)
    console.print(f"before: {old['machine_info']['commit']}, now: {new['machine_info']['commit']}")
    show(rows, console)
    show_machine(new, old, console)
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder, "now.json")
            figures.write_json(path, new)
        # pytest-benchmark's own comparison, with the spread of the rounds.
        command = [
            sys.executable, "-m", "pytest_benchmark", f"--storage=file://{tables.RESULTS}", "compare", str(old_path), str(path),
            "--group-by=fullname", "--columns=min,median,iqr,rounds", "--sort=name",
        ]  # fmt: skip
        subprocess.run(command, check=True)
    slow = [row["name"] for row in rows if row["slower"] and row["ours"]]
    console.print(f"{len(slow)} of {len(rows)} figures got slower: {', '.join(slow)}" if slow else "nothing got slower")
    if slow and arguments.fail:
        sys.exit(1)


if __name__ == "__main__":
    main()
