"""pytest-benchmark set up for this project: the ``measure`` fixture, the machine's description, ratios and goals."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind an installed pyattr, so that the installed one is what is measured

from bench import figures, machine, peers  # noqa: E402
from bench.contenders import ContenderError  # noqa: E402

_CEILINGS = pytest.StashKey[dict]()
_GOALS = pytest.StashKey[list]()
_SKIPPED = pytest.StashKey[list]()
FLUSH_BYTES = 256 << 20  # more than any last-level cache here


class Clock:
    """pytest-benchmark's timer: stands still, and is moved on by the seconds that each contender measured itself.

    So a worker's own time, CUDA events and the CPU's clock all count the same way.
    """

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


def pytest_addoption(parser):
    group = parser.getgroup("pyattr benchmarks")
    group.addoption("--bench-seconds", type=float, default=3.0, help="time to spend on the rounds of one figure")
    group.addoption("--bench-flush", action="store_true", help="empty the caches before each round in this process")
    group.addoption("--bench-no-peers", action="store_true", help="leave out the peers that need their own environment")


def pytest_configure(config):
    config.stash[_GOALS], config.stash[_SKIPPED] = [], []


def pytest_collection_modifyitems(config, items):
    goals = {}
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        for goal in getattr(item.module, "GOALS", ()):
            goals[goal.table, goal.text] = goal
    config.stash[_GOALS] = list(goals.values())


@pytest.fixture(scope="session")
def ceilings(request) -> dict:
    """The machine's measured ceilings, once per run."""
    if _CEILINGS not in request.config.stash:
        request.config.stash[_CEILINGS] = machine.measure_ceilings()
    return request.config.stash[_CEILINGS]


@pytest.fixture(scope="session")
def peer_python(request) -> Path | None:
    """The interpreter of the peers' environment; None when there is none."""
    return None if request.config.getoption("bench_no_peers") or peers.missing() else peers.python()


@pytest.fixture
def leave_out(request):
    """``leave_out(table, row, column, reason)``: skip a figure and say so in the recorded run."""

    def skip(table: str, row: str, column: str, reason: str):
        request.config.stash[_SKIPPED].append({"table": table, "row": row, "column": column, "reason": reason})
        pytest.skip(reason)

    return skip


def _flush(device: str):
    if device == "cuda":
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    else:
        torch.ones(FLUSH_BYTES // 4).sum()


@pytest.fixture
def measure(request, benchmark, ceilings, leave_out):
    """``measure(contender, check=..., table=..., row=..., column=..., ...)``: check the answer once, then time it.

    Args of the call:
        contender: of bench/contenders.py.
        check: takes the first answer, raises AssertionError when it is wrong. Nothing wrong is timed.
        table, row, column: where the figure stands in a README table; ``row`` names the contender.
        ours: whether it is this project's code; peers get ratios.
        work, unit: operations per call and what they are.
        bytes: least traffic to and from memory per call.
        ceiling: which measured ceiling bounds the work: "adds_per_s", "fmas_per_s", or None.
        kind: of the work, where a table has several that cannot be compared; a peer is compared with ours of its kind.
        note: what a reader must know, such as a smaller shape.
        rounds: at most this many rounds.
        extra: more entries of the recorded figure, such as peak memory.
        flush: empty the caches before each round; default, --bench-flush.
    """

    def run(
        contender, *, check, table, row, column, ours, work, unit, bytes,
        ceiling=None, kind="", note="", rounds=30, extra=None, flush=None,
    ):  # fmt: skip
        config = request.config
        try:
            answer, first = contender.first()
            check(answer)
            del answer
            seconds = config.getoption("bench_seconds")
            rounds = min(rounds, max(1 if first > seconds else 3, int(seconds / max(first, 1e-6))))
            device = getattr(contender, "device", "cpu")
            flush = config.getoption("bench_flush") if flush is None else flush

            def one_round():
                CLOCK.seconds += contender.round()

            benchmark.group = f"{table} {column}"
            benchmark.pedantic(one_round, setup=(lambda: _flush(device)) if flush else None, rounds=rounds)
        except ContenderError as error:
            if ours:
                raise
            leave_out(table, row, column, str(error))
        on_cpu = device == "cpu"
        benchmark.extra_info.update(
            {"table": table, "row": row, "column": column, "ours": ours, "note": note},
            **({"kind": kind} if kind else {}),
            **figures.describe(
                benchmark.stats["median"],
                work=work,
                unit=unit,
                bytes=bytes,
                ceiling=(ceiling, ceilings.get(ceiling) if ceiling and on_cpu else None),
                ram=ceilings.get("ram_read_bytes_per_s") if on_cpu else None,
            ),
            **({"versions": contender.about} if getattr(contender, "about", None) else {}),
            **(extra or {}),
        )

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(machine.describe(), ceilings=config.stash.get(_CEILINGS, {}))


def pytest_benchmark_update_commit_info(config, commit_info):
    kept = {key: commit_info.get(key) for key in ("id", "time", "dirty", "branch")}
    commit_info.clear()
    commit_info.update(kept)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    figures.add_ratios(output_json["benchmarks"])
    output_json["goals"] = figures.check_goals(
        config.stash[_GOALS], output_json["benchmarks"], config.stash.get(_CEILINGS, {})
    )
    output_json["skipped"] = config.stash[_SKIPPED]
    trimmed = figures.trim(output_json)
    output_json.clear()
    output_json.update(trimmed)
