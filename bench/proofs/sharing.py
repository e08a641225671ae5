"""Items 4 and 5: what a call gains from another: one picture through many adapters, one system prompt before many."""

from __future__ import annotations

from dataclasses import replace

from bench.cells import WARM_UP_SEED, NothingMeasured, Plan
from bench.claims import Claim, Proof
from bench.endpoint import Endpoint
from bench.load import Load
from bench.measure import failures
from bench.proofs.bed import Bed
from bench.scenarios import SCENARIOS, run_scenario
from bench.scrape import between, scrape
from bench.trace import Trace
from bench.workloads import workload_named

NUM_ADAPTERS = 8
ENCODES = "image_cache_misses_total"


def prove_pictures(bed: Bed) -> Proof:
    """Adapters touch the language layers alone. Second questions at the made shape, where a picture is 192 tokens; the
    rest on the embedded base, whose pictures are 16."""
    plan = bed.plan("pocket")
    with bed.pocket(NUM_ADAPTERS) as endpoint:
        encodes = tuple(_encodes(endpoint, plan, repeat) for repeat in range(bed.num_pairs))
        fan_out = _scenario(bed, endpoint, "fan-out", plan)
    again = _scenario(bed, bed.shared(), "picture", bed.plan("prove"))
    apart = _scenario(bed, bed.shared(), "picture-apart", bed.plan("prove"))
    ratio = "second_to_first_ratio"
    claims = (
        Claim(4, "pictures encoded for 8 calls at once on one, 8 adapters", encodes, 1.0, "at most"),
        Claim(4, "fan-out of 8 to 8 calls in turn", _values(fan_out, "to_in_turn_ratio"), 0.4, "at most"),
        Claim(4, "fan-out of 8 to 8 calls at once", _values(fan_out, "to_at_once_ratio")),
        Claim(
            4,
            "second question on a picture, first token to the first's",
            _values(again, ratio),
            0.5,
            "at most",
        ),
        Claim(4, "the same through another adapter", _values(apart, ratio)),
    )
    return Proof(claims, (fan_out, again, apart))


def prove_prefix(bed: Bed) -> Proof:
    cell = _scenario(bed, bed.shared(), "prefix", bed.plan("prove"))
    values = _values(cell, "second_to_first_ratio")
    return Proof(
        (
            Claim(
                5,
                "first token behind a shared system prompt of 512 tokens, hit to miss",
                values,
                0.3,
                "at most",
            ),
        ),
        (cell,),
    )


def _encodes(endpoint: Endpoint, plan: Plan, repeat: int) -> float:
    """How many pictures our server encoded for eight calls at once on the same one. Raises NothingMeasured."""
    (call,) = replace(plan, num_calls=1).trace(workload_named("one-picture"), repeat).calls
    calls = tuple(replace(call, index=number, adapter=number) for number in range(NUM_ADAPTERS))
    before = scrape(endpoint.url, endpoint.api_key)
    run = Load(endpoint).send(Trace("one-picture", plan.size, calls, NUM_ADAPTERS))
    if failed := failures(run):
        raise NothingMeasured(f"calls on one picture failed: {'; '.join(failed)}")
    return between(before, scrape(endpoint.url, endpoint.api_key)).get(ENCODES, 0.0)


def _scenario(bed: Bed, endpoint: Endpoint, name: str, plan: Plan) -> dict[str, object]:
    """After one that does not count, of other calls: what it asks is cached from then on."""
    warm_up = replace(plan, num_repeats=1, seed=WARM_UP_SEED)
    run_scenario(endpoint, SCENARIOS[name], warm_up, lambda _: None)
    return run_scenario(endpoint, SCENARIOS[name], plan, bed.tell)


def _values(cell: dict[str, object], figure: str) -> tuple[float, ...]:
    runs = cell["runs"]
    return tuple(float(run[figure]) for run in runs) if isinstance(runs, list) else ()
