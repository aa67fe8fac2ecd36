"""What stands between the README's markers."""

import pytest

from bench import tables


def machine(slug="2-core-zen3", date="2026-01-01T10:00:00", commit="abc123"):
    cpu = {"name": "AMD EPYC", "kind": "zen3"}
    return {"slug": slug, "date": date, "commit": commit, "cpu": cpu, "threads": 2, "gpus": []}


def entry(row, column, rate, ours, note="", slowest=1.2, **more):
    info = {"table": "op", "row": row, "column": column, "ours": ours, "work_per_s": rate, "note": note, "unit": "sums"}
    return {"extra_info": {**info, **more}, "stats": {"min": 1.0, "max": slowest}}


def make_run(**where):
    return {
        "machine_info": machine(**where),
        "benchmarks": [
            entry("pyattr cpu", "B=1", 16.46e9, True),
            entry("pyattr cpu", "B=64", 180e9, True),
            entry("pyattr reference", "B=1", 0.05e9, True, peak_mib=12.4),
            entry("slow peer", "B=1", 0.0823e9, False, note="D=200"),
            entry("slow peer", "B=64", 1.5e9, False, note="D=200", slowest=2.0),
        ],
        "skipped": [{"table": "op", "row": "absent peer", "column": "B=1", "reason": "not installed"}],
    }


EXPECTED = """\
AMD EPYC, zen3, 2 threads; commit abc123, 2026-01-01. In billion sums per second; in brackets, how many times faster \
pyattr's fastest backend is.

| | B=1 | B=64 | |
|---|---:|---:|---|
| pyattr cpu | 16.5 | 180 |  |
| pyattr reference | 0.0500, 12 MiB | – |  |
| slow peer | 0.0823 (200x) | 1.50 (120x) † | D=200 |

† disturbed: the slowest round took over 1.5 times as long as the fastest.

Left out: absent peer: not installed"""


def test_table():
    assert tables.table(make_run(), "op") == EXPECTED


def test_a_peer_is_compared_with_ours_of_its_own_kind():
    """A fast sketch of ours says nothing of a dense projection by others."""
    figures = [
        entry("pyattr sparse", "B=1", 800.0, True, kind="sparse"),
        entry("peer sparse", "B=1", 400.0, False, kind="sparse"),
        entry("pyattr dense", "B=1", 30.0, True, kind="dense"),
        entry("peer dense", "B=1", 40.0, False, kind="dense"),
        entry("peer mask", "B=1", 50.0, False, kind="mask"),
    ]
    found = tables.table({"machine_info": machine(), "benchmarks": figures}, "op")
    assert "in brackets, how many times faster pyattr's fastest row of the same kind is." in found
    assert "| peer sparse | 400 (2.00x) |" in found
    assert "| peer dense | 40.0 (0.750x) |" in found
    assert "| peer mask | 50.0 |" in found


def test_small_rates_are_written_in_ones():
    run = {"machine_info": machine(), "benchmarks": [entry("pyattr", "B=1", 12.0, True)]}
    assert "In sums per second" in tables.table(run, "op")


def test_fill_keeps_the_text_around_and_is_idempotent():
    page = "before\n<!-- bench:op -->\nold\n<!-- /bench -->\nafter `<!-- bench:op -->`\n"
    page += "<!-- backends -->\nold\n<!-- /backends -->\n.\n"
    runs = [(None, make_run())]
    filled = tables.fill(page, runs)
    assert filled.startswith(
        f"before\n<!-- bench:op -->\n{EXPECTED}\n<!-- /bench -->\nafter `<!-- bench:op -->`\n<!-- backends -->\n| op |"
    )
    assert "| `rademacher_project` | yes | yes | yes | yes |" in filled
    assert filled.endswith("<!-- /backends -->\n.\n")
    assert tables.fill(filled, runs) == filled


def test_a_table_without_a_run_says_so():
    page = "<!-- bench:rademacher_project -->\nold\n<!-- /bench -->"
    wanted = "<!-- bench:rademacher_project -->\nNot measured yet.\n<!-- /bench -->"
    assert tables.fill(page, []) == wanted


def test_the_newest_run_of_each_machine_counts():
    runs = [
        (None, make_run(commit="old", date="2026-01-01")),
        (None, make_run(commit="gpu", date="2026-01-02", slug="16-core-h200")),
        (None, make_run(commit="new", date="2026-01-03")),
        (None, {"machine_info": machine(commit="other", date="2026-01-04"), "benchmarks": []}),
    ]
    assert [run["machine_info"]["commit"] for run in tables.newest(runs, "op")] == ["gpu", "new"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- bench:nothing -->\n<!-- /bench -->", "no benchmark and no recorded run has a table 'nothing'"),
        ("<!-- bench:op -->\n", "1 lines .* but 0 lines '<!-- /bench -->'"),
        ("<!-- /backends -->\n", "0 lines '<!-- backends -->' but 1 lines"),
    ],
)
def test_bad_markers_are_errors(page, message):
    with pytest.raises(ValueError, match=message):
        tables.fill(page, [(None, make_run())])


def test_pages_are_rewritten_only_when_they_change(tmp_path):
    from bench.figures import write_json

    write_json(tmp_path / "results" / "2-core" / "abc.json", make_run())
    page, plain = tmp_path / "README.md", tmp_path / "other.md"
    page.write_text("<!-- bench:op -->\n<!-- /bench -->\n", encoding="utf8")
    plain.write_text("no markers", encoding="utf8")
    pages = (page, plain, tmp_path / "absent.md")
    assert tables.update(pages, tmp_path / "results") == [page]
    assert tables.update(pages, tmp_path / "results") == []
