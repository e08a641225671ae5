"""The step's clock: every second is in one phase, and retries add up."""

from __future__ import annotations

from collections.abc import Callable

from engine.clock import StepClock


def ticking(*times: float) -> Callable[[], float]:
    later = iter(times)
    return lambda: next(later)


def test_a_lap_is_what_passed_since_the_one_before() -> None:
    clock = StepClock(ticking(10.0, 10.5, 12.0))
    assert clock.lap("receive") == 0.5 and clock.lap("plan") == 1.5
    assert clock.seconds == {"receive": 0.5, "plan": 1.5}


def test_phases_that_come_again_add_up_and_another_clock_may_have_split_them() -> None:
    clock = StepClock(ticking(0.0, 1.0, 4.0, 6.0))
    clock.lap("forward")
    clock.split({"batch": 1.0, "forward": 1.75})
    clock.lap("sample")
    assert clock.seconds == {"forward": 2.75, "batch": 1.0, "sample": 2.0}
