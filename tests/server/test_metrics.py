"""Metrics: the wire page's names, bounded labels, and a scrape that stays small and quick."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from adapters.ref import BASE, AdapterRef
from engine.observer import (
    AdapterEvicted,
    AdapterLookup,
    AdapterMoved,
    AdapterMoveFailed,
    DecodeStalled,
    Event,
    FirstToken,
    ImageLookup,
    ImagesEncoded,
    NextToken,
    Passed,
    SequenceEnded,
    SequenceStarted,
    StepDone,
    SteppedAhead,
    StepRetried,
)
from engine.status import EngineStatus, SlotStatus
from server.histograms import LatencyTable
from server.labels import MAX_LABEL_CHARS, MAX_LABELS, AdapterLabels
from server.metrics import Metrics
from tests.support.surface import client_of, make_surface

WIRE_NAMES = """
time_to_first_token_seconds inter_token_latency_seconds request_latency_seconds queue_seconds adapter_load_seconds
decode_stall_seconds step_seconds step_cpu_seconds_total batch_rows batch_distinct_adapters image_encode_seconds
requests_total
prompt_tokens_total generation_tokens_total adapter_loads_total adapter_load_failures_total adapter_evictions_total
adapter_cache_hits_total adapter_cache_misses_total prefix_cache_hits_tokens_total prefix_cache_misses_tokens_total
image_cache_hits_total image_cache_misses_total http_requests_total requests_running requests_waiting adapter_slots
adapter_bytes kv_cache_usage_ratio adapter_info kernels_info engine_recoveries_total ready
steps_ahead_total rows_dropped_total
"""
VLLM_NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_perc time_to_first_token_seconds inter_token_latency_seconds
e2e_request_latency_seconds lora_requests_info cache_config_info
"""


def adapter(name: str, number: int = 1) -> AdapterRef:
    return AdapterRef(name, 1, f"{number:064x}")


def status(**changes: object) -> EngineStatus:
    values: dict[str, object] = {
        "is_ready": True,
        "is_alive": True,
        "is_draining": False,
        "running": {"base": 1, "a": 2},
        "waiting": {"b": 3},
        "waiting_for_adapter": 3,
        "kv_blocks_used": 4,
        "kv_blocks_total": 16,
        "slots": (
            SlotStatus(0, adapter("a"), "resident", False, 2, 100),
            SlotStatus(1, adapter("b"), "loading", False, 0, 0),
            SlotStatus(2, None, "free", False, 0, 0),
        ),
        "host_bytes": 700,
        "host_refs": frozenset({adapter("a"), adapter("c")}),
        "slot_bank_bytes": 300,
        "steps": 9,
        "heartbeat_age_s": 0.0,
        "kernels": {"linear": "bitsandbytes", "attention": "triton"},
    }
    return EngineStatus(**{**values, **changes})  # type: ignore[arg-type]


def life(ref: AdapterRef) -> list[Event]:
    """One request of two tokens."""
    return [
        AdapterLookup(ref, True),
        SequenceStarted(ref, 0.01, 0.0),
        FirstToken(ref, 0.02, 7),
        NextToken(ref, 0.003),
        SequenceEnded(ref, "stop", 0.5, 2),
    ]


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("the-base")
    metrics.watch(8, 16, status, lambda: True)
    return metrics


def record(metrics: Metrics, *events: Event) -> None:
    for event in events:
        metrics.record(event)


def samples(metrics: Metrics) -> list[Sample]:
    text = metrics.render().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [s.value for s in samples(metrics) if s.name == name and labels.items() <= s.labels.items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_a_phase_has_both_clocks(metrics: Metrics) -> None:
    for _ in range(2):
        record(metrics, StepDone({"plan": 0.25, "forward": 0.5}, {"plan": 0.125, "forward": 0.375}, 1, 1))
    assert value(metrics, "lorikeet_step_seconds_sum", phase="plan") == pytest.approx(0.5)
    assert value(metrics, "lorikeet_step_cpu_seconds_total", phase="plan") == pytest.approx(0.25)
    assert value(metrics, "lorikeet_step_cpu_seconds_total", phase="forward") == pytest.approx(0.75)


def test_every_name_of_the_wire_page_is_served(metrics: Metrics) -> None:
    record(metrics, *life(adapter("a")), StepDone({"forward": 0.01}, {"forward": 0.008}, 1, 1))
    record(metrics, ImagesEncoded(1, 4, 0.1))
    record(metrics, AdapterMoved(adapter("a"), 1, {"read": 0.1}), DecodeStalled("adapter_copy", 0.1))
    metrics.count_http("/x", "GET", 200)
    text = metrics.render().decode()
    for name in WIRE_NAMES.split():
        assert f"# TYPE lorikeet_{name} " in text, name
    for name in VLLM_NAMES.split():
        assert f"# TYPE vllm:{name} " in text, name
    assert "_created" not in text


def test_a_request_moves_its_adapters_series(metrics: Metrics) -> None:
    record(metrics, *life(adapter("a")), *life(BASE))
    for label in ("a", "base"):
        assert value(metrics, "lorikeet_requests_total", adapter=label, status="stop") == 1
        assert value(metrics, "lorikeet_prompt_tokens_total", adapter=label) == 7
        assert value(metrics, "lorikeet_generation_tokens_total", adapter=label) == 2
        assert value(metrics, "lorikeet_time_to_first_token_seconds_count", adapter=label) == 1
        assert value(metrics, "lorikeet_time_to_first_token_seconds_bucket", adapter=label, le="0.01") == 0
        assert value(metrics, "lorikeet_time_to_first_token_seconds_bucket", adapter=label, le="0.025") == 1
        assert value(metrics, "lorikeet_queue_seconds_sum", adapter=label) == pytest.approx(0.01)
        assert value(metrics, "lorikeet_request_latency_seconds_sum", adapter=label) == pytest.approx(0.5)
    assert value(metrics, "vllm:inter_token_latency_seconds_count", model_name="the-base") == 2
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum", model_name="the-base") == pytest.approx(1.0)


def test_passes_are_counted_by_way(metrics: Metrics) -> None:
    assert value(metrics, "lorikeet_forward_passes_total", way="graph") == 0
    record(metrics, Passed("graph"), Passed("graph"), Passed("eager"))
    assert value(metrics, "lorikeet_forward_passes_total", way="graph") == 2
    assert value(metrics, "lorikeet_forward_passes_total", way="eager") == 1


def test_adapter_and_image_events_are_counted(metrics: Metrics) -> None:
    ref = adapter("a")
    record(metrics, AdapterMoved(ref, 10, {"read": 0.01, "copy": 0.02}), AdapterMoveFailed(ref, "non_finite"))
    record(metrics, AdapterEvicted(ref, "lru"), AdapterEvicted(ref, "unload"), AdapterLookup(ref, False))
    record(
        metrics,
        AdapterEvicted(ref, "lru", "host"),
        AdapterLookup(ref, False, True),
        AdapterLookup(ref, True, True),
    )
    record(
        metrics,
        ImageLookup(True),
        ImageLookup(False),
        ImagesEncoded(2, 100, 0.2),
        StepRetried(1, "ValueError"),
    )
    assert value(metrics, "lorikeet_adapter_loads_total", outcome="ok") == 1
    assert value(metrics, "lorikeet_adapter_loads_total", outcome="failed") == 1
    assert value(metrics, "lorikeet_adapter_load_failures_total", reason="non_finite") == 1
    assert value(metrics, "lorikeet_adapter_load_seconds_sum", stage="copy") == pytest.approx(0.02)
    assert value(metrics, "lorikeet_adapter_evictions_total", tier="device", reason="unload") == 1
    assert value(metrics, "lorikeet_adapter_evictions_total", tier="host", reason="lru") == 1
    assert value(metrics, "lorikeet_adapter_cache_misses_total", tier="device") == 2
    assert value(metrics, "lorikeet_adapter_cache_hits_total", tier="device") == 1
    assert value(metrics, "lorikeet_adapter_cache_misses_total", tier="host") == 1
    assert value(metrics, "lorikeet_adapter_cache_hits_total", tier="host") == 1
    assert value(metrics, "lorikeet_image_cache_hits_total") == 1
    assert value(metrics, "lorikeet_image_encode_seconds_count") == 1
    assert value(metrics, "lorikeet_step_retries_total") == 1


def test_steps_ahead_and_their_dropped_rows_are_counted(metrics: Metrics) -> None:
    assert value(metrics, "lorikeet_steps_ahead_total") == 0
    record(metrics, SteppedAhead(0), SteppedAhead(3), SteppedAhead(1))
    assert value(metrics, "lorikeet_steps_ahead_total") == 3
    assert value(metrics, "lorikeet_rows_dropped_total") == 4


def test_gauges_are_the_engines_status_now(metrics: Metrics) -> None:
    record(metrics, AdapterLookup(adapter("a"), True))
    assert value(metrics, "lorikeet_requests_running", adapter="a") == 2
    assert value(metrics, "lorikeet_requests_running", adapter="base") == 1
    assert value(metrics, "lorikeet_requests_waiting", adapter="other") == 3
    assert value(metrics, "lorikeet_adapter_slots", tier="device", state="loading") == 1
    assert value(metrics, "lorikeet_adapter_slots", tier="host", state="resident") == 2
    assert value(metrics, "lorikeet_adapter_bytes", tier="device") == 300
    assert value(metrics, "lorikeet_kv_cache_usage_ratio") == 0.25
    assert value(metrics, "lorikeet_kernels_info", kind="linear", by="bitsandbytes") == 1
    assert value(metrics, "lorikeet_ready") == 1
    assert value(metrics, "lorikeet_adapter_info", adapter="a", version="1", digest=f"{1:064x}") == 1
    assert value(metrics, "vllm:num_requests_waiting", model_name="the-base") == 3
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="16") == 1


def test_recoveries_are_counted_by_how_the_engine_came_back() -> None:
    counted = Metrics("the-base")
    counted.watch(3, 16, lambda: status(num_recoveries=5, num_restarts=2), lambda: True)
    assert value(counted, "lorikeet_engine_recoveries_total", how="reset") == 3
    assert value(counted, "lorikeet_engine_recoveries_total", how="restart") == 2


def test_lora_requests_info_is_one_series_whose_value_is_now(metrics: Metrics) -> None:
    found = [s for s in samples(metrics) if s.name == "vllm:lora_requests_info"]
    assert len(found) == 1
    assert found[0].labels == {"max_lora": "8", "running_lora_adapters": "a", "waiting_lora_adapters": "b"}
    assert abs(found[0].value - time.time()) < 60


# ---- bounded labels --------------------------------------------------------------------------------------------


def test_the_most_used_adapters_have_their_own_series_and_the_rest_share_one(metrics: Metrics) -> None:
    names = [f"adapter-{i}" for i in range(MAX_LABELS + 20)]
    for name in names:
        record(metrics, *life(adapter(name)))
    labels = {s.labels["adapter"] for s in samples(metrics) if s.name == "lorikeet_requests_total"}
    assert labels == {*names[:MAX_LABELS], "other"}
    assert value(metrics, "lorikeet_requests_total", adapter="other", status="stop") == 20


def test_a_newly_popular_adapter_takes_the_place_of_the_least_used() -> None:
    left: list[str] = []
    labels = AdapterLabels(left.append)
    for i in range(MAX_LABELS):
        for _ in range(3 if i else 2):
            labels.use(adapter(f"adapter-{i}"))
    hot = adapter("hot")
    for _ in range(4):
        labels.use(hot)
        assert labels.label(hot) == "other"
    labels.use(hot)
    assert labels.label(hot) == "hot"
    assert left == ["adapter-0"]
    assert labels.label_of("adapter-0") == "other"


def test_series_go_when_the_adapter_goes_and_do_not_come_back_with_its_last_tokens(metrics: Metrics) -> None:
    gone = adapter("invoice")
    record(metrics, *life(gone))
    assert b"invoice" in metrics.render()
    metrics.forget(gone)
    record(metrics, NextToken(gone, 0.1), *life(gone))
    assert b"invoice" not in metrics.render()
    assert value(metrics, "lorikeet_requests_total", adapter="other", status="stop") == 1
    metrics.labels.welcome(gone)
    record(metrics, *life(gone))
    assert value(metrics, "lorikeet_requests_total", adapter="invoice", status="stop") == 1


def test_a_name_alone_never_makes_a_series(metrics: Metrics) -> None:
    assert metrics.labels.label_of("from a client") == "other"
    record(metrics, NextToken(adapter("unborn"), 0.1))
    assert b"unborn" not in metrics.render()


@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from(["use", "use", "use", "forget", "welcome"])),
        max_size=300,
    )
)
def test_labels_stay_bounded_whatever_happens(acts: list[tuple[int, str]]) -> None:
    labels = AdapterLabels(lambda name: None)
    for number, act in acts:
        getattr(labels, act)(adapter(f"{'long' * (number % 20)}{number}", number))
        names = [ref.name for ref in labels.refs()]
        assert len(names) <= MAX_LABELS
        assert sum(map(len, names)) <= MAX_LABEL_CHARS


# ---- size and speed --------------------------------------------------------------------------------------------


def test_a_scrape_at_10000_adapters_is_small_and_quick(metrics: Metrics) -> None:
    refs = [adapter(f"team/adapter-of-a-usual-length-{i:05d}", i) for i in range(10_000)]
    for ref in refs:
        record(metrics, AdapterLookup(ref, True))
    for ref in metrics.labels.refs():
        record(metrics, *life(ref))
    for name in range(40):
        metrics.count_http(f"/route/{name}", "GET", 200)
    metrics.render()
    took_s = min(_timed(metrics) for _ in range(5))
    assert len(metrics.render()) < 512 * 1024
    assert took_s < 0.05


def _timed(metrics: Metrics) -> float:
    begin_s = time.thread_time()
    metrics.render()
    return time.thread_time() - begin_s


def test_recording_and_scraping_at_once_is_safe(metrics: Metrics) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def scrape() -> None:
        try:
            while not stop.is_set():
                metrics.render()
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=scrape)
    thread.start()
    for i in range(300):
        record(metrics, *life(adapter(f"a{i % 90}")))
        if i % 10 == 0:
            metrics.forget(adapter(f"a{i % 90}"))
    stop.set()
    thread.join()
    assert failures == []


@given(st.lists(st.floats(0, 100), max_size=50))
def test_the_table_counts_as_prometheus_does(values: list[float]) -> None:
    """Against the slow plain loop, through prometheus-client's own parser."""
    bounds = (0.001, 0.5, 1, 20)
    table = LatencyTable("t_seconds", "Text.", bounds, "adapter")
    for seconds in values:
        table.observe('a"\\b', seconds)
    (family,) = text_string_to_metric_families(table.render())
    assert family.type == "histogram"
    found = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    if values:
        for bound in bounds:
            assert found["t_seconds_bucket", str(float(bound))] == sum(v <= bound for v in values)
        assert found["t_seconds_bucket", "+Inf"] == found["t_seconds_count", None] == len(values)
        assert found["t_seconds_sum", None] == pytest.approx(sum(values))
        assert all(s.labels["adapter"] == 'a"\\b' for s in family.samples)


def test_get_and_head_over_the_wire(tmp_path: Path) -> None:
    with client_of(make_surface(tmp_path)) as client:
        get, head = client.get("/metrics"), client.head("/metrics")
    assert get.status_code == head.status_code == 200
    assert get.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert head.content == b""
    assert re.search(r"^lorikeet_ready 1\.0$", get.text, re.M)
