"""A slow-down must be seen, and noise must not be taken for one."""

import io

import pytest
from rich.console import Console

from bench import compare


def figure(name, median, fastest, ours=True, proj_dim=10, **ratios):
    info = {"ours": ours, "times_faster_than": ratios} if ours else {"ours": ours}
    info |= {"work": 100 * proj_dim, "shape": {"B": 1, "P": 100, "D": proj_dim}}
    return {"fullname": name, "extra_info": info, "stats": {"median": median, "min": fastest}}


def run(*benchmarks, commit="new", date="2026-01-02", slug="2-core", **ceilings):
    machine = {"slug": slug, "commit": commit, "date": date, "ceilings": ceilings}
    return {"machine_info": machine, "benchmarks": list(benchmarks)}


@pytest.mark.parametrize(
    ("median", "fastest", "flagged"),
    [(1.0, 0.9, False), (1.09, 0.99, False), (1.5, 0.9, False), (1.2, 1.1, True), (0.5, 0.4, False)],
)
def test_slower_means_median_and_fastest_round_both(median, fastest, flagged):
    [row] = compare.compare(run(figure("a", median, fastest)), run(figure("a", 1.0, 0.9)))
    assert row["slower"] is flagged
    assert row["speed"] == pytest.approx(1 / median)


def test_rates_are_compared_where_the_shape_is_another():
    """Twice the work in 1.2 times the seconds is faster, and half the work in the same seconds is slower."""
    old = run(figure("grown", 1.0, 1.0), figure("shrunk", 1.0, 1.0))
    new = run(figure("grown", 1.2, 1.2, proj_dim=20), figure("shrunk", 1.0, 1.0, proj_dim=5))
    grown, shrunk = compare.compare(new, old)
    assert grown["speed"] == pytest.approx(2 / 1.2) and not grown["slower"]
    assert shrunk["speed"] == pytest.approx(0.5) and shrunk["slower"]
    console = Console(width=160, record=True, file=io.StringIO())
    compare.show([grown, shrunk], console)
    assert "B=1, P=100, D=10 -> B=1, P=100, D=20" in console.export_text()


def test_ratios_to_peers_stand_side_by_side():
    new = run(figure("a", 1.0, 1.0, torch=4.0, fresh=9.0), figure("only now", 1.0, 1.0))
    old = run(figure("a", 1.0, 1.0, torch=5.0, gone=3.0), figure("only before", 1.0, 1.0))
    [row] = compare.compare(new, old)
    assert row["peers"] == {"torch": (5.0, 4.0)}


def test_the_last_run_is_of_this_kind_of_machine_and_of_another_commit():
    runs = [
        ("oldest", run(commit="a", date="2026-01-01")),
        ("other machine", run(commit="b", date="2026-01-02", slug="16-core")),
        ("wanted", run(commit="c", date="2026-01-03")),
        ("this very commit", run(commit="new", date="2026-01-04")),
        ("later", run(commit="d", date="2026-01-09")),
    ]
    assert compare.last_run(run(date="2026-01-05"), runs)[0] == "wanted"
    assert compare.last_run(run(date="2026-01-05", slug="8-core"), runs) is None


def test_what_is_shown():
    console = Console(width=160, record=True, file=io.StringIO())
    new = run(figure("fast[cpu-B1]", 1.0, 1.0, torch=4.0), figure("slow[cpu-B1]", 2.0, 2.0), adds_per_s=50.0)
    old = run(figure("fast[cpu-B1]", 2.0, 2.0, torch=2.0), figure("slow[cpu-B1]", 1.0, 1.0), adds_per_s=100.0)
    compare.show(compare.compare(new, old), console)
    compare.show_machine(new, old, console)
    lines = console.export_text().splitlines()
    slow, fast = (next(line for line in lines if name in line) for name in ("slow[cpu-B1]", "fast[cpu-B1]"))
    assert "slow[cpu-B1]" in slow and "0.50 SLOWER" in slow and "1 -> 2" in slow
    assert "2.00" in fast and "torch: 2 -> 4" in fast and "SLOWER" not in fast
    assert any("adds_per_s 100 -> 50, 0.50 of before" in line for line in lines)
