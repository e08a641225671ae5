"""Progress: what a person sees of a run while it works: bars on a terminal, plain lines elsewhere.

Owns: how counts, loss, tokens/s, memory and time left are shown, and how often. Does not know: what the phases do.
Everything goes to stderr, so that stdout is the result's. Place in a training run: beside every phase.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_EVERY_S: Final = 5.0
"""How often a phase says a plain line."""


class Bar(Protocol):
    """One phase as it goes on."""

    def advance(self, count: int = 1, facts: str = "") -> None:
        """So many more done; ``facts`` stand beside the count from now on."""
        ...

    def reach(self, count: int, facts: str = "", total: int | None = None) -> None:
        """So many done in all."""
        ...


class Progress(Protocol):
    """Where the phases of a run are told."""

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Bar]:
        """One phase of ``total`` things to do, or of nobody knows how many."""
        ...

    def note(self, text: str) -> None:
        """Something to read, of any number of lines."""
        ...


def open_progress(stream: TextIO | None = None) -> Progress:
    """Bars if ``stream`` (stderr) is a terminal, else lines."""
    stream = stream or sys.stderr
    return TerminalProgress() if stream.isatty() else PlainProgress(stream)


# ---- nobody watches: the other processes of a distributed run


class _SilentBar:
    def advance(self, count: int = 1, facts: str = "") -> None:
        pass

    def reach(self, count: int, facts: str = "", total: int | None = None) -> None:
        pass


class SilentProgress:
    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Bar]:
        yield _SilentBar()

    def note(self, text: str) -> None:
        pass


# ---- lines


class PlainProgress:
    """A line when a phase ends, and one every few seconds while it lasts."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Bar]:
        started = self._clock()
        bar = _PlainBar(self._say, self._clock, name, total)
        try:
            yield bar
        except BaseException:
            self._say(f"{bar.line()}: stopped after {self._clock() - started:.1f} s")
            raise
        self._say(f"{bar.line()}: {self._clock() - started:.1f} s")

    def note(self, text: str) -> None:
        self._say(text)

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class _PlainBar:
    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float], name: str, total: int | None
    ) -> None:
        self._say, self._clock, self._name, self._total = say, clock, name, total
        self._count, self._facts, self._said_at = 0, "", clock()

    def advance(self, count: int = 1, facts: str = "") -> None:
        self.reach(self._count + count, facts)

    def reach(self, count: int, facts: str = "", total: int | None = None) -> None:
        self._count, self._facts, self._total = count, facts or self._facts, total or self._total
        if self._clock() - self._said_at >= LINE_EVERY_S:
            self._said_at = self._clock()
            self._say(self.line())

    def line(self) -> str:
        of = f"/{self._total}" if self._total else ""
        count = f" {self._count}{of}" if self._count or of else ""
        return f"{self._name}{count}{f'  {self._facts}' if self._facts else ''}"


# ---- bars


class TerminalProgress:
    """Rich's bars: a phase's own while it lasts, a tick and its seconds when it is over."""

    def __init__(self, console: Console | None = None) -> None:
        """``console`` is stderr's if not given."""
        from rich import console as rich_console

        self._console = console or rich_console.Console(stderr=True)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Bar]:
        with _rich_bars(self._console) as bars:
            task = bars.add_task(name, total=total, facts="")
            yield _RichBar(bars, task)
            bars.update(
                task, total=bars.tasks[task].completed or 1, completed=bars.tasks[task].completed or 1
            )

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _rich_bars(console: Console) -> RichProgress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}", style="dim"),
        console=console,
    )


class _RichBar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task, self._facts = bars, task, ""

    def advance(self, count: int = 1, facts: str = "") -> None:
        self._facts = facts or self._facts
        self._bars.update(self._task, advance=count, facts=self._facts)

    def reach(self, count: int, facts: str = "", total: int | None = None) -> None:
        self._facts = facts or self._facts
        if total is not None:
            self._bars.update(self._task, total=total)
        self._bars.update(self._task, completed=count, facts=self._facts)


# ---- how numbers are written


@dataclass(frozen=True, slots=True)
class Pace:
    """How a training run fares, for one line."""

    loss: float
    tokens_per_s: float
    memory_bytes: int
    seconds_left: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}  {self.tokens_per_s:,.0f} tokens/s  {size(self.memory_bytes)}"
            f"  {duration(self.seconds_left)} left"
        )


def size(num_bytes: int) -> str:
    """Bytes as people read them: "5.1 GiB", "340 MiB"."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """As a clock writes them: 0:41, 12:05, 3:20:00."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
