"""The step's clock: every second is in one phase, and retries add up."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.clock import StepClock


def ticking(*times: float) -> Callable[[], float]:
    later = iter(times)
    return lambda: next(later)


def test_a_lap_is_what_passed_since_the_one_before() -> None:
    clock = StepClock(ticking(10.0, 10.5, 12.0), ticking(3.0, 3.5, 3.75))
    assert clock.lap("receive") == 0.5 and clock.lap("plan") == 1.5
    assert clock.seconds == {"receive": 0.5, "plan": 1.5}
    assert clock.cpu_seconds == {"receive": 0.5, "plan": 0.25}


def test_phases_that_come_again_add_up_and_another_clock_may_have_split_them() -> None:
    clock = StepClock(ticking(0.0, 1.0, 4.0, 6.0), ticking(0.0, 0.5, 1.5, 2.0))
    clock.lap("forward")
    clock.split({"batch": 1.0, "forward": 1.75}, {"batch": 0.25, "forward": 0.5})
    clock.lap("sample")
    assert clock.seconds == {"forward": 2.75, "batch": 1.0, "sample": 2.0}
    assert clock.cpu_seconds == {"forward": 1.0, "batch": 0.25, "sample": 0.5}


def test_a_phase_that_waits_takes_no_processor() -> None:
    clock = StepClock()
    time.sleep(0.05)
    clock.lap("sample")
    assert clock.cpu_seconds["sample"] < clock.seconds["sample"]
