"""What people see while the work runs."""

import io

import pytest
from rich.console import Console

from pyattr.cli.display import LOG_EVERY, UNITS, Display


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def log():
    stream, clock = io.StringIO(), Clock()
    with Display(Console(file=stream, width=200), clock) as display:
        yield display, clock, lambda: stream.getvalue().splitlines()


def test_a_log_gets_a_line_now_and_then_with_the_time_left(log):
    display, clock, lines = log
    display.stage("1/2 ")
    display.progress(0, 100, "train")
    for done in range(1, 101):
        clock.now += 1.0
        display.progress(done, 100, "train")
    assert LOG_EVERY == 20
    assert lines() == [
        "1/2 train 20/100 steps, 1 min 20 s left",
        "1/2 train 40/100 steps, 1 min 00 s left",
        "1/2 train 60/100 steps, 40 s left",
        "1/2 train 80/100 steps, 20 s left",
        "1/2 train 100/100 steps, 1 min 40 s",
    ]


def test_resumed_work_does_not_count_what_was_there(log):
    display, clock, lines = log
    display.progress(90, 100, "features")
    clock.now += 25
    display.progress(95, 100, "features")
    assert lines() == ["features 95/100 images, 25 s left"]


def test_each_stage_has_its_own_clock(log):
    display, clock, lines = log
    display.stage("1/2 ")
    display.progress(0, 1, "train")
    clock.now += 5
    display.progress(1, 1, "train")
    display.stage("2/2 ")
    display.progress(0, 2, "sample")
    clock.now += 3
    display.progress(2, 2, "sample")
    display.progress(0, 1, "eigendecomposition")
    display.progress(1, 1, "eigendecomposition")
    assert lines() == [
        "1/2 train 1/1 steps, 5.0 s",
        "2/2 sample 2/2 denoising steps, 3.0 s",
        "2/2 eigendecomposition 1/1, 0.0 s",
    ]


def test_every_stage_of_an_ensemble_has_a_unit():
    assert {UNITS[stage] for stage in ("counterfactual", "jacobian", "last_step", "members")} == {"denoising steps"}
    assert (UNITS["classifier"], UNITS["image features"]) == ("epochs", "images")


def test_a_terminal_gets_bars():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with Display(console) as display:
        display.stage("1/1 ")
        display.progress(3, 10, "train")
        display.progress(10, 10, "train")
        display.say("install pyattr[demo]")
    text = stream.getvalue()
    assert "1/1 train" in text and "10/10" in text and "steps" in text
    assert "install pyattr[demo]" in text  # no markup


def test_bars_stop_when_the_work_fails():
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=True, width=120))
    with pytest.raises(KeyboardInterrupt), display:
        display.progress(1, 10, "train")
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is back
