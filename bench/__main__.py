"""``python -m bench [NAME ...]``: run the benchmarks beside their peers, record the run, rewrite the README's tables."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from . import figures, peers, tables
from .machine import ROOT

FILES = {path.stem.removeprefix("bench_"): path for path in sorted((ROOT / "bench").glob("bench_*.py"))}


def run(names: list[str], *, with_peers: bool = True, options: tuple[str, ...] = ()) -> dict:
    """Run the named benchmarks (all of them for an empty list) and return the run, not yet recorded.

    Raises:
        SystemExit: a benchmark failed, so nothing may be recorded; or a name is unknown.
    """
    unknown = [name for name in names if name not in FILES]
    if unknown:
        sys.exit(f"bench: NAME must be one of {', '.join(FILES)}, got {', '.join(unknown)}")
    if with_peers and peers.missing():
        print("bench: installing the peers into .venv-peers, once (minutes)", flush=True)
        try:
            peers.install()
        except subprocess.CalledProcessError:
            print("bench: the peers could not be installed; their figures are left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run.json")
        command = [
            sys.executable, "-m", "pytest", *(str(FILES[name]) for name in names or FILES),
            "-o", "python_files=bench_*.py", f"--benchmark-json={output}", "-p", "no:cacheprovider", "-rs",
            "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname", "--benchmark-warmup=off",
            *([] if with_peers else ["--bench-no-peers"]), *options,
        ]  # fmt: skip
        status = subprocess.run(command, cwd=ROOT).returncode
        if status:
            sys.exit(f"bench: a benchmark failed (pytest's status {status}); nothing was recorded")
        return json.loads(output.read_text(encoding="utf8"))


def recorded_path(run: dict, results: Path = tables.RESULTS) -> Path:
    """Where a run is recorded: one file for each commit and kind of machine."""
    return results / run["machine_info"]["slug"] / f"{run['machine_info']['commit']}.json"


def record(run: dict, results: Path = tables.RESULTS, *, filtered: bool = False) -> Path:
    """Write a run down, over the same tables (figures, where it was filtered) of an earlier run of the same commit."""
    path = recorded_path(run, results)
    earlier = json.loads(path.read_text(encoding="utf8")) if path.exists() else None
    figures.write_json(path, figures.merge(earlier, run, filtered=filtered))
    return path


def print_goals(run: dict) -> None:
    """One line for each goal."""
    for goal in run["goals"]:
        verdict = {True: "met   ", False: "MISSED", None: "-     "}[goal["met"]]
        measured = goal["why"] if goal["measured"] is None else f"{goal['measured']:.4g} (wanted {goal['wanted']:.4g})"
        print(f"{verdict} {goal['table']}: {goal['text']}: {measured}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(FILES)}; all when none is given")
    parser.add_argument("--no-peers", action="store_true", help="leave out the peers that need their own environment")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for the rounds of one figure (default 3)")
    arguments = parser.parse_args()
    options = (f"--bench-seconds={arguments.seconds}",)
    done = run(arguments.names, with_peers=not arguments.no_peers, options=options)
    print(f"\nrecorded in {record(done).relative_to(ROOT)}")
    if figures.is_clean(done):
        for page in tables.update():
            print(f"rewrote the tables of {page.relative_to(ROOT)}")
    else:
        print("the sources differ from the commit, so the tables stay as they are: commit, then run again")
    print_goals(done)


if __name__ == "__main__":
    main()
