"""Rates, ratios, goals and merging, on runs small enough to work out by hand."""

import json
import sys

import pytest

from bench import figures


def figure(row, column, rate, *, ours, table="op", seconds=1.0):
    info = {"table": table, "row": row, "column": column, "ours": ours, "work_per_s": rate, "note": "", "unit": "sums"}
    stats = dict.fromkeys(figures.STATS, seconds) | {"rounds": 3, "iterations": 1, "outliers": "0;0"}
    return {"group": f"{table} {column}", "name": f"test_{table}[{row}-{column}]", "extra_info": info, "stats": stats}


def run(*benchmarks, commit="abc", date="2026-01-01", slug="2-core", **more):
    machine = {"slug": slug, "commit": commit, "date": date}
    return {"machine_info": machine, "benchmarks": list(benchmarks), "goals": [], "skipped": [], **more}


def test_rates_and_shares_of_the_ceilings():
    found = figures.describe(0.5, work=100, unit="adds", bytes=20, ceiling=("adds_per_s", 400.0), ram=80.0)
    assert found == {
        "unit": "adds", "work": 100, "work_per_s": 200.0, "bytes": 20, "bytes_per_s": 40.0,
        "percent_of_adds_per_s": 50.0, "percent_of_ram_read": 50.0,
    }  # fmt: skip


def test_a_ceiling_that_was_not_measured_gives_no_share():
    found = figures.describe(0.5, work=100, unit="adds", bytes=20, ceiling=("adds_per_s", None), ram=None)
    assert not [key for key in found if key.startswith("percent")]


def test_ratios_are_to_peers_of_the_same_table_and_column_only():
    ours = figure("pyattr", "B=1", 40.0, ours=True)
    benchmarks = [
        ours,
        figure("slow", "B=1", 10.0, ours=False),
        figure("fast", "B=1", 80.0, ours=False),
        figure("slow", "B=16", 1.0, ours=False),
        figure("slow", "B=1", 1.0, ours=False, table="other"),
        figure("pyattr reference", "B=1", 1.0, ours=True),
    ]
    figures.add_ratios(benchmarks)
    assert ours["extra_info"]["times_faster_than"] == {"slow": 4.0, "fast": 0.5}
    assert "times_faster_than" not in benchmarks[1]["extra_info"]


def test_ratios_are_to_peers_of_the_same_kind_only():
    ours, sketch = figure("pyattr", "B=1", 40.0, ours=True), figure("pyattr sketch", "B=1", 900.0, ours=True)
    others = [figure("peer", "B=1", 10.0, ours=False), figure("peer's sketch", "B=1", 300.0, ours=False)]
    for dense, sparse in ((ours, sketch), others):
        dense["extra_info"]["kind"], sparse["extra_info"]["kind"] = "dense", "sparse"
    figures.add_ratios([ours, sketch, *others])
    assert ours["extra_info"]["times_faster_than"] == {"peer": 4.0}
    assert sketch["extra_info"]["times_faster_than"] == {"peer's sketch": 3.0}


def test_goals_are_met_missed_or_not_measured():
    ratio = figures.lead("pyattr", "peer", "B=1")
    goals = [
        figures.Goal("op", "twice", ratio, 2),
        figures.Goal("op", "five times", ratio, 5),
        figures.Goal("op", "elsewhere", lambda rate: rate("pyattr", "B=64"), 1, missing="no B=64"),
    ]
    benchmarks = [
        figure("pyattr", "B=1", 8.0, ours=True),
        figure("peer", "B=1", 4.0, ours=False),
        figure("pyattr", "B=64", 9.0, ours=True, table="other"),
    ]
    checked = figures.check_goals(goals, benchmarks)
    assert [(goal["met"], goal["measured"]) for goal in checked] == [(True, 2.0), (False, 2.0), (None, None)]
    assert checked[2]["why"] == "no B=64"


def test_a_lead_is_over_the_fastest_that_was_measured():
    rates = {("scalar", "B=1"): 2.0, ("avx2", "B=1"): 6.0, ("slow peer", "B=1"): 1.0, ("fast peer", "B=1"): 4.0}

    def rate(row, column):
        return rates.get((row, column))

    rows, peers = ("scalar", "avx2", "avx512"), ("slow peer", "fast peer")
    assert figures.lead(rows, peers, "B=1")(rate) == 1.5
    assert figures.lead("scalar", "slow peer", "B=1")(rate) == 2.0
    assert figures.lead(rows, "another peer", "B=1")(rate) is None
    assert figures.lead(rows, peers, "B=64")(rate) is None


def test_goals_read_peak_memory():
    benchmarks = [figure("pyattr", "B=1", 8.0, ours=True), figure("peer", "B=1", 4.0, ours=False)]
    benchmarks[0]["extra_info"]["peak_mib"] = 25.0
    seen = []
    goal = figures.Goal("op", "at most 30 MiB", lambda rate: seen.append(rate(figures.PEAK + "peer", "B=1")), 1)
    less = figures.Goal("op", "at most 30 MiB", lambda rate: 30 / rate(figures.PEAK + "pyattr", "B=1"), 1)
    assert [entry["met"] for entry in figures.check_goals([goal, less], benchmarks)] == [None, True] and seen == [None]


def test_trimmed_output_is_still_compared_by_pytest_benchmark(tmp_path, capsys, monkeypatch):
    from pytest_benchmark.cli import main

    full = figure("pyattr", "B=1", 8.0, ours=True)
    full |= {"fullname": "bench/bench_op.py::x", "options": {}, "params": {}, "param": "x"}
    full["stats"] = full["stats"] | {"data": [1.0] * 1000, "ld15iqr": 1.0, "outliers": "0;0"}
    trimmed = figures.trim({"benchmarks": [full], "machine_info": {}, "commit_info": {}, "version": "5", "junk": 1})
    assert "junk" not in trimmed and "data" not in trimmed["benchmarks"][0]["stats"]
    paths = [tmp_path / "2-core" / f"{name}.json" for name in ("abc", "def")]
    for path in paths:
        figures.write_json(path, trimmed)
    options = ["--columns=min,median,iqr,rounds", "--sort=name"]
    command = ["pytest-benchmark", f"--storage=file://{tmp_path}", "compare", *map(str, paths), *options]
    monkeypatch.setattr(sys, "argv", command)
    main()
    printed = capsys.readouterr().out
    assert "op[pyattr-B=1] (" in printed and "2 tests" in printed


def goal(table, text, measured):
    return {"table": table, "text": text, "measured": measured}


def test_a_filtered_run_replaces_its_own_figures_and_keeps_the_table(tmp_path):
    old = run(
        figure("cpu", "B=1", 1.0, ours=True),
        figure("cuda", "B=1", 2.0, ours=True),
        goals=[goal("op", "of the CPU", 1.0), goal("op", "of the GPU", 2.0), goal("op", "of both", None)],
        skipped=[
            {"table": "op", "row": "peer", "column": "B=1", "reason": "no peer"},
            {"table": "op", "row": "triton", "column": "B=1", "reason": "no triton"},
        ],
    )
    new = run(
        figure("cuda", "B=1", 3.0, ours=True),
        figure("triton", "B=1", 4.0, ours=True),
        goals=[goal("op", "of the CPU", None), goal("op", "of the GPU", 3.0), goal("op", "of both", None)],
    )
    merged = figures.merge(old, new, filtered=True)
    assert {(f["extra_info"]["row"], f["extra_info"]["work_per_s"]) for f in merged["benchmarks"]} == {
        ("cpu", 1.0),
        ("cuda", 3.0),
        ("triton", 4.0),
    }  # fmt: skip
    assert merged["goals"] == [
        goal("op", "of the CPU", 1.0),
        goal("op", "of both", None),
        goal("op", "of the GPU", 3.0),
    ]
    assert [entry["row"] for entry in merged["skipped"]] == ["peer"]


def test_a_run_of_one_table_says_nothing_of_the_goals_of_another():
    """Two tables of one file, run one after the other: each goal stands once, with its number."""
    goals = [("small", "30 ms"), ("large", "235 ms")]
    first = run(figure("a", "B=1", 1.0, ours=True, table="small"), goals=[goal(*goals[0], 25.0), goal(*goals[1], None)])
    then = run(figure("a", "B=1", 1.0, ours=True, table="large"), goals=[goal(*goals[0], None), goal(*goals[1], 200.0)])
    for filtered in (False, True):
        merged = figures.merge(first, then, filtered=filtered)
        assert merged["goals"] == [goal(*goals[0], 25.0), goal(*goals[1], 200.0)]


def test_a_disturbed_figure_is_known_by_its_rounds():
    calm = figure("a", "B=1", 1.0, ours=True)
    calm["stats"] |= {"min": 1.0, "max": 1.4}
    assert not figures.disturbed(calm)
    calm["stats"]["max"] = 1.6
    assert figures.disturbed(calm)


def test_a_partial_run_replaces_its_own_tables_and_keeps_the_others():
    old = run(
        figure("pyattr", "B=1", 1.0, ours=True),
        figure("gone", "B=1", 1.0, ours=False),
        figure("pyattr", "B=1", 5.0, ours=True, table="other"),
        goals=[goal("op", "old", 1.0), goal("other", "kept", 5.0)],
        skipped=[{"table": "op", "row": "x"}],
    )
    new = run(
        figure("pyattr", "B=1", 2.0, ours=True),
        goals=[goal("op", "new", 2.0), goal("other", "kept", None)],
        date="2026-01-02",
    )
    merged = figures.merge(old, new)
    assert {(f["extra_info"]["table"], f["extra_info"]["work_per_s"]) for f in merged["benchmarks"]} == {
        ("op", 2.0),
        ("other", 5.0),
    }
    assert merged["goals"] == [goal("other", "kept", 5.0), goal("op", "new", 2.0)]
    assert merged["skipped"] == []
    assert merged["machine_info"]["date"] == "2026-01-02"
    assert figures.merge(None, new) is new


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "machine" / "abc.json"
    figures.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        figures.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_runs_are_read_oldest_first_without_those_of_a_changed_tree(tmp_path):
    for name, date in (("b", "2026-01-02"), ("a", "2026-01-03"), ("c-dirty", "2026-01-04"), ("d", "2026-01-01")):
        figures.write_json(tmp_path / "2-core" / f"{name}.json", run(commit=name, date=date))
    assert [found["machine_info"]["commit"] for _, found in figures.read_runs(tmp_path)] == ["d", "b", "a"]
