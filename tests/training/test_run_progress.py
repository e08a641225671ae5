"""What a person sees of a run: lines where nobody watches a terminal, bars where somebody does."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from training.run.progress import (
    Pace,
    PlainProgress,
    SilentProgress,
    TerminalProgress,
    duration,
    open_progress,
    size,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_phase_says_a_line_every_few_seconds_and_one_at_its_end() -> None:
    said, clock = io.StringIO(), Clock()
    with PlainProgress(said, clock).phase("train", 100) as bar:
        for _ in range(100):
            clock.now += 0.12
            bar.advance(facts="loss 0.5000")
    assert said.getvalue().splitlines() == [
        "train 42/100  loss 0.5000",
        "train 84/100  loss 0.5000",
        "train 100/100  loss 0.5000: 12.0 s",
    ]


def test_a_phase_of_unknown_length_counts() -> None:
    said = io.StringIO()
    with PlainProgress(said, Clock()).phase("check data") as bar:
        bar.advance(3)
        bar.reach(5)
    assert said.getvalue() == "check data 5: 0.0 s\n"


def test_a_phase_that_breaks_off_says_so_and_hides_nothing() -> None:
    said = io.StringIO()
    with pytest.raises(ValueError, match="why"), PlainProgress(said, Clock()).phase("load base"):
        raise ValueError("why")
    assert said.getvalue() == "load base: stopped after 0.0 s\n"


def test_a_total_that_is_learnt_later_is_shown() -> None:
    said = io.StringIO()
    with PlainProgress(said, Clock()).phase("train") as bar:
        bar.reach(7, total=9)
    assert said.getvalue().startswith("train 7/9")


def test_a_terminal_shows_bars_and_keeps_notes() -> None:
    screen = io.StringIO()
    progress = TerminalProgress(Console(file=screen, force_terminal=True, width=120))
    with progress.phase("train", 4) as bar:
        bar.advance(2, facts="loss 0.2500")
        progress.note("a note [with brackets]")
        bar.reach(4)
    shown = screen.getvalue()
    assert "a note [with brackets]" in shown
    assert "loss 0.2500" in shown
    assert "4/4" in shown


def test_a_file_gets_lines_and_a_silent_process_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    said = io.StringIO()
    open_progress(said).note("hello")
    assert said.getvalue() == "hello\n"
    silent = SilentProgress()
    with silent.phase("train", 3) as bar:
        bar.advance()
        bar.reach(2)
    silent.note("nothing")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_pace_is_one_line() -> None:
    assert str(Pace(0.25, 5120.4, 5 * 2**30, 61)) == "loss 0.2500  5,120 tokens/s  5.0 GiB  1:01 left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (59.6, "1:00"), (725, "12:05"), (12000, "3:20:00")]
)
def test_durations_read_as_on_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_are_in_binary_units() -> None:
    assert (size(340 * 2**20), size(int(5.1 * 2**30))) == ("340 MiB", "5.1 GiB")
