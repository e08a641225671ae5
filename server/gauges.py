"""StatusCollector: the gauges, read from the engine's status at each scrape, so that none is stale or left behind."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from adapters.ref import COMPOSED
from engine.status import EngineStatus
from server.labels import AdapterLabels


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What does not change while the server runs."""

    model_name: str
    num_slots: int
    block_size: int


class StatusCollector(Collector):
    def __init__(
        self,
        facts: EngineFacts,
        labels: AdapterLabels,
        status: Callable[[], EngineStatus],
        is_ready: Callable[[], bool],
        store_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._facts = facts
        self._labels = labels
        self._status = status
        self._is_ready = is_ready
        self._store_bytes = store_bytes

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield self._by_adapter(
            "lorikeet_requests_running", "Sequences that decode or prefill.", status.running
        )
        yield self._by_adapter("lorikeet_requests_waiting", "Sequences in the queue.", status.waiting)
        yield _slots(status)
        yield _bytes(status, self._store_bytes())
        yield self._info()
        yield _kernels(status)
        yield _recoveries(status)
        yield _gauge("lorikeet_kv_cache_usage_ratio", "Used part of the KV blocks.", _kv_usage(status))
        yield _gauge("lorikeet_ready", "1 when the server takes requests.", float(self._is_ready()))
        yield from self._vllm(status)

    def _by_adapter(self, name: str, text: str, counts: Mapping[str, int]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["adapter"])
        totals: Counter[str] = Counter({"base": 0})
        for adapter, count in counts.items():
            totals[self._labels.label_of(adapter)] += count
        for label, count in totals.items():
            family.add_metric([label], count)
        return family

    def _info(self) -> Metric:
        family = GaugeMetricFamily(
            "lorikeet_adapter_info",
            "Versions of the most used adapters.",
            labels=["adapter", "version", "digest"],
        )
        for ref in self._labels.refs():
            family.add_metric([ref.name, str(ref.version), ref.digest], 1)
        return family

    def _vllm(self, status: EngineStatus) -> Iterator[Metric]:
        """vLLM's names, which gateways and dashboards read."""
        name = self._facts.model_name
        pairs = (
            (
                "vllm:num_requests_running",
                "Sequences that decode or prefill.",
                float(sum(status.running.values())),
            ),
            ("vllm:num_requests_waiting", "Sequences in the queue.", float(sum(status.waiting.values()))),
            ("vllm:kv_cache_usage_perc", "Used part of the KV blocks, 1 is full.", _kv_usage(status)),
        )
        for metric, text, value in pairs:
            family = GaugeMetricFamily(metric, text, labels=["model_name"])
            family.add_metric([name], value)
            yield family
        yield self._lora_info(status)
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache's layout.",
            labels=["model_name", "block_size", "num_gpu_blocks"],
        )
        cache.add_metric([name, str(self._facts.block_size), str(status.kv_blocks_total)], 1)
        yield cache

    def _lora_info(self, status: EngineStatus) -> Metric:
        """Exactly one series, whose value is the time now: gateways take the newest.

        Compositions are left out: no request names one, so no gateway can route by them.
        """
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that run and wait.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running, waiting = (
            ",".join(
                sorted(name for name, count in counts.items() if count and name not in ("base", COMPOSED))
            )
            for counts in (status.running, status.waiting)
        )
        family.add_metric([str(self._facts.num_slots), running, waiting], time.time())
        return family


def _kernels(status: EngineStatus) -> Metric:
    family = GaugeMetricFamily("lorikeet_kernels_info", "Whose kernels compute what.", labels=["kind", "by"])
    for kind, by in status.kernels.items():
        family.add_metric([kind, by], 1)
    return family


def _recoveries(status: EngineStatus) -> Metric:
    family = CounterMetricFamily(
        "lorikeet_engine_recoveries", "Faults after which the engine went on.", labels=["how"]
    )
    family.add_metric(["reset"], status.num_recoveries - status.num_restarts)
    family.add_metric(["restart"], status.num_restarts)
    return family


def _kv_usage(status: EngineStatus) -> float:
    return status.kv_blocks_used / status.kv_blocks_total if status.kv_blocks_total else 0.0


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _slots(status: EngineStatus) -> Metric:
    family = GaugeMetricFamily(
        "lorikeet_adapter_slots", "Adapters by tier and state.", labels=["tier", "state"]
    )
    counts = Counter(slot.state for slot in status.slots)
    for state in ("free", "loading", "resident"):
        family.add_metric(["device", state], counts[state])
    family.add_metric(["host", "resident"], len(status.host_refs))
    return family


def _bytes(status: EngineStatus, store_bytes: int) -> Metric:
    family = GaugeMetricFamily("lorikeet_adapter_bytes", "Bytes of adapters by tier.", labels=["tier"])
    family.add_metric(["device"], status.slot_bank_bytes)
    family.add_metric(["host"], status.host_bytes)
    family.add_metric(["disk"], store_bytes)
    return family
