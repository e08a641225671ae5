"""A ramp of rates: more and more calls a second, until the answers are too late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bench.cells import NothingMeasured, Plan, Server
from bench.endpoint import Endpoint
from bench.load import Load
from bench.measure import measure
from bench.workloads import Workload

Tell = Callable[[str], None]
GOOD_SHARE = 0.9
"""A rate is borne while so many calls are within the SLO."""
SWEEP_STEP = 1.5
MAX_SWEEP = 14


def sweep(endpoint: Endpoint, workload: Workload, plan: Plan, tell: Tell) -> dict[str, object]:
    """Offer more and more calls a second until the SLO breaks; the knee is the last rate that was borne.

    Raises ValueError for a closed loop, NothingMeasured if no call of the first rate came back.
    """
    if workload.cv is None:
        raise ValueError(f"{workload.name} is a closed loop: a sweep needs an open one, such as open-cv1")
    Load(endpoint).send(plan.warm_up(workload))
    rate = plan.rate or 0.5
    steps: list[dict[str, object]] = []
    knee: float | None = None
    for number in range(MAX_SWEEP):
        run = Load(endpoint).send(replace(plan, rate=rate).trace(workload, number))
        figures = measure(run, plan.slo)
        if not steps and figures["num_failed"] == figures["num_calls"]:
            raise NothingMeasured(f"no call of {workload.name} to {endpoint.label} came back whole")
        steps.append({"rate": rate, "figures": figures})
        tell(
            f"{endpoint.label} {workload.name} at {rate:.2f}/s: {figures['goodput_share']:.0%} within the SLO"
        )
        if figures["goodput_share"] < GOOD_SHARE:
            break
        knee = rate
        rate *= SWEEP_STEP
    about = Server(endpoint).about()
    return {"workload": workload.name, "size": plan.size, "endpoint": about, "sweep": steps, "knee": knee}
