"""Cells and scenarios: who is asked what, and in which order; against a server on a socket that answers by a script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.cells import FirstCalls, NothingMeasured, Plan, Server, parity_of, ratio, run_side_by_side
from bench.endpoint import Endpoint
from bench.proofs import sharing
from bench.proofs.bed import Bed
from bench.ramp import sweep
from bench.running import compared, other_server, run_workloads
from bench.scenarios import SCENARIOS, run_scenario
from bench.scrape import between, read_counters, step_profile
from bench.workloads import workload_named
from tests.bench.fake_sse import Script, fake_sse_server

PLAN = Plan("smoke", 2)
NAMES = tuple(f"adapter-{number}" for number in range(64))


def silent(_: str) -> None:
    """Nobody listens."""


@pytest.fixture
def server() -> Iterator[tuple[Server, Script]]:
    with fake_sse_server() as (url, script):
        yield Server(Endpoint(url, "pocket", adapters=NAMES)), script


def test_two_sides_get_the_same_calls_in_turns_and_the_base_no_adapters(
    server: tuple[Server, Script],
) -> None:
    ours, script = server
    plan = replace(PLAN, has_warm_up=False, num_calls=4)
    workload = replace(workload_named("closed-8"), num_streams=1)
    mine, base = run_side_by_side([ours, ours.base_only()], workload, plan, silent)
    has_adapter = ["adapter" in body for body in script.bodies]
    assert has_adapter == [True] * 4 + [False] * 8 + [True] * 4  # ours, base; base, ours
    prompts = [body["messages"] for body in script.bodies]
    assert prompts[:4] == prompts[4:8] and prompts[8:12] == prompts[12:]
    assert prompts[:4] != prompts[8:12]  # a repeat sends other calls
    assert mine.traces == base.traces
    assert ratio(mine, base)["num_pairs"] == 2
    assert parity_of(mine, base)["num_compared"] == 8 and parity_of(mine, base)["num_equal"] == 0


def test_a_cell_keeps_what_is_needed_to_know_it_again(server: tuple[Server, Script]) -> None:
    ours, _ = server
    workload = replace(workload_named("closed-8"), num_streams=4)
    cells = compared(run_side_by_side([ours, ours.base_only()], workload, PLAN, silent), workload, PLAN)
    assert cells[0]["digests"] == [PLAN.trace(workload, repeat).digest for repeat in range(2)]
    assert "lorikeet, base only" in str(cells[0]["ratios"]) and "ratios" not in cells[1]
    assert isinstance(cells[0]["by_adapter"], dict) and set(cells[0]["by_adapter"]) == set(NAMES[:8])


def test_a_warm_up_is_sent_and_not_counted(server: tuple[Server, Script]) -> None:
    ours, script = server
    (measured,) = run_side_by_side([ours], workload_named("closed-1"), replace(PLAN, num_repeats=1), silent)
    assert len(script.bodies) > len(measured.runs[0].streams)


def test_a_run_without_a_whole_call_is_an_error_and_no_figure(server: tuple[Server, Script]) -> None:
    ours, script = server
    script.fault = "status"
    with pytest.raises(NothingMeasured, match="429"):
        run_side_by_side([ours], workload_named("closed-1"), PLAN, silent)


def test_with_the_base_beside_it_a_workload_gives_two_cells(server: tuple[Server, Script]) -> None:
    ours, _ = server
    plan = replace(PLAN, num_repeats=1)
    cells = run_workloads(ours.endpoint, ["closed-1", "base-1"], plan, silent, is_against_base=True)
    assert [cell["workload"] for cell in cells] == ["closed-1", "closed-1", "base-1"]


@pytest.mark.parametrize("name", ["prefix", "picture", "picture-apart", "swap"])
def test_pairs_share_what_their_name_says(server: tuple[Server, Script], name: str) -> None:
    ours, script = server
    cell = run_scenario(ours.endpoint, SCENARIOS[name], replace(PLAN, num_repeats=1), silent)
    assert "second_to_first_ratio" in str(cell["median"])
    first, second = script.bodies[-2:]
    if name == "prefix":
        assert _roles(first)[0] == "system" and _parts(first, 0) == _parts(second, 0)
    if name == "picture":
        assert str(_parts(first, 0)).split("text")[0] == str(_parts(second, 0)).split("text")[0]
        assert first["adapter"] == second["adapter"]
    if name == "picture-apart":
        assert str(_parts(first, 0)).split("text")[0] == str(_parts(second, 0)).split("text")[0]
        assert first["adapter"] != second["adapter"]
    if name == "swap":
        assert first["adapter"] == second["adapter"]
        assert len({str(body["adapter"]) for body in script.bodies[:-16]}) == 32  # all others came between


def test_what_a_proof_warms_up_with_never_comes_again(server: tuple[Server, Script], tmp_path: Path) -> None:
    """Its first pair would find in the cache what it calls a miss."""
    ours, script = server
    bed = Bed(tmp_path, "tiny", 3, silent)
    sharing._scenario(bed, ours.endpoint, "prefix", bed.plan("smoke"))
    systems = [str(body["messages"]) for body in script.bodies]
    assert len(systems) == len(set(systems)) == 2 * (1 + 3)
    starts = Counter(text[:200] for text in systems)
    assert set(starts.values()) == {2} and len(starts) == 1 + 3


def test_a_cold_swap_unloads_before_each_first_call(server: tuple[Server, Script]) -> None:
    ours, script = server
    plan = replace(PLAN, num_repeats=1, pairs_per_repeat=3)
    run_scenario(ours.endpoint, SCENARIOS["cold-swap"], plan, silent)
    order = [path.rsplit("/", 2)[-2] if path.endswith("/unload") else "asked" for path in script.paths]
    assert order == [word for name in NAMES[:3] for word in (name, "asked", "asked")]


def test_a_server_that_cannot_unload_gives_no_cold_swap(server: tuple[Server, Script]) -> None:
    ours, script = server
    script.fault = "status"
    with pytest.raises(NothingMeasured, match="does not unload adapter-0"):
        run_scenario(ours.endpoint, SCENARIOS["cold-swap"], PLAN, silent)


def test_a_target_of_first_calls_sends_no_more_and_says_so(server: tuple[Server, Script]) -> None:
    ours, _ = server
    plan = replace(PLAN, num_repeats=1, has_warm_up=False, num_calls=6)
    whole, few = run_side_by_side([ours, FirstCalls(ours, 2)], workload_named("closed-1"), plan, silent)
    assert (len(whole.runs[0].streams), len(few.runs[0].streams)) == (6, 2)
    assert few.cell(workload_named("closed-1"), plan)["endpoint"] == ours.about() | {"first_calls": 2}
    assert parity_of(whole, few)["num_compared"] == 2


def test_a_warm_up_may_be_short() -> None:
    workload = workload_named("closed-8")
    cut = replace(PLAN, warm_up_tokens=2).warm_up(workload)
    assert {call.num_tokens for call in cut.calls} == {2}
    assert [call.prompt for call in cut.calls] == [call.prompt for call in PLAN.warm_up(workload).calls]


def test_guests_arrive_beside_hosts(server: tuple[Server, Script]) -> None:
    ours, script = server
    script.gap_s = 0.04  # hosts decode for over a second
    cell = run_scenario(ours.endpoint, SCENARIOS["storm"], replace(PLAN, num_repeats=1), silent)
    assert script.most_at_once > 8
    assert len({str(body["adapter"]) for body in script.bodies}) == 40
    assert "worst_stall_ratio" in str(cell["median"])


def test_a_scenario_with_a_failed_call_gives_no_figure(server: tuple[Server, Script]) -> None:
    ours, script = server
    script.fault = "cut"
    with pytest.raises(NothingMeasured, match="DONE"):
        run_scenario(ours.endpoint, SCENARIOS["prefix"], PLAN, silent)


def test_a_sweep_ends_at_the_rate_that_is_not_borne(server: tuple[Server, Script]) -> None:
    ours, script = server
    plan = replace(PLAN, num_calls=6, rate=40.0)
    script.first_s = 0.002
    plan = replace(plan, slo=replace(plan.slo, first_token_ms=0.001))
    cell = sweep(ours.endpoint, workload_named("open-cv1"), plan, silent)
    assert cell["knee"] is None and isinstance(cell["sweep"], list) and len(cell["sweep"]) == 1
    with pytest.raises(ValueError, match="closed loop"):
        sweep(ours.endpoint, workload_named("closed-1"), plan, silent)


def test_other_servers_are_named_by_four_words() -> None:
    found = other_server("vllm,http://host:8000/,base,model", NAMES)
    assert (found.label, found.url, found.naming, found.is_plain) == (
        "vllm",
        "http://host:8000",
        "model",
        False,
    )
    for text in ("vllm,http://host", "a,b,c,nothing"):
        with pytest.raises(ValueError, match="label,url,model,naming"):
            other_server(text, NAMES)


METRICS = """# TYPE lorikeet_adapter_loads counter
lorikeet_adapter_loads_total{outcome="ok"} 3.0
lorikeet_adapter_loads_total{outcome="failed"} 1.0
lorikeet_step_seconds_sum{phase="forward"} 0.3
lorikeet_step_seconds_count{phase="forward"} 10
lorikeet_step_seconds_sum{phase="plan"} 0.1
lorikeet_step_seconds_count{phase="plan"} 10
lorikeet_step_seconds_bucket{phase="plan",le="1"} 10
lorikeet_ready 1.0
"""


def test_what_a_server_counted_is_summed_over_labels_but_not_over_a_step_s_phases() -> None:
    counted = between({"lorikeet_adapter_loads_total": 1.0}, read_counters(METRICS))
    assert counted["adapter_loads_total"] == 3.0
    assert "ready" not in counted and not any("bucket" in name for name in counted)
    profile = step_profile(counted)
    assert profile["forward_ms"] == 30.0 and profile["forward_share"] == 0.75
    assert next(iter(profile)) == "forward_ms"


def _roles(body: dict[str, object]) -> list[str]:
    messages = body["messages"]
    assert isinstance(messages, list)
    return [message["role"] for message in messages]


def _parts(body: dict[str, object], place: int) -> object:
    messages = body["messages"]
    assert isinstance(messages, list)
    return messages[place]["content"]
