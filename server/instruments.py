"""The metrics' names, labels and buckets, on a registry of their own. Nothing is measured here.

Buckets are few, because 64 adapters have each of the latency histograms; first and next tokens start at 1 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from server.histograms import LatencyTable

FIRST_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 2.5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
QUEUE_S = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10, 60)
STEP_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
LOAD_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a line more for each series, which no dashboard reads


@dataclass(frozen=True, slots=True)
class TokenCounters:
    """One adapter's own counters, looked up once because they move with every token."""

    prompt: Counter
    generation: Counter


class Instruments:
    """All counters and histograms. Gauges are read at scrape time: see ``server/gauges.py``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._by_adapter()
        self._of_steps()
        self._of_caches()
        self._of_vllm()
        self.http_requests = self._counter(
            "http_requests_total", "HTTP requests answered.", "route", "method", "status"
        )

    def _by_adapter(self) -> None:
        def table(name: str, text: str, bounds: tuple[float, ...]) -> LatencyTable:
            return LatencyTable(f"lorikeet_{name}", text, bounds, "adapter")

        self.first_token = table(
            "time_to_first_token_seconds", "From acceptance to the first token.", FIRST_TOKEN_S
        )
        self.next_token = table(
            "inter_token_latency_seconds", "From a token of a request to its next.", NEXT_TOKEN_S
        )
        self.latency = table("request_latency_seconds", "From acceptance to the end.", REQUEST_S)
        self.queue = table("queue_seconds", "From acceptance to the first scheduling.", QUEUE_S)
        self.requests = self._counter("requests_total", "Sequences that ended.", "adapter", "status")
        self.prompt_tokens = self._counter(
            "prompt_tokens_total", "Prompt tokens computed or cached.", "adapter"
        )
        self.generation_tokens = self._counter("generation_tokens_total", "Tokens generated.", "adapter")

    def _of_steps(self) -> None:
        self.step = LatencyTable(
            "lorikeet_step_seconds", "Phases of the engine's step.", STEP_S, "phase"
        )  # observed nine times a step
        self.step_cpu = self._counter(
            "step_cpu_seconds_total",
            "Processor time of the engine's thread in the phases of its step.",
            "phase",
        )
        self.batch_rows = self._histogram("batch_rows", "Decoding sequences in a step.", ROWS)
        self.batch_adapters = self._histogram(
            "batch_distinct_adapters", "Adapters in a step, base not counted.", ROWS
        )
        self.image_encode = self._histogram(
            "image_encode_seconds", "Encoding of a step's new images.", LOAD_S
        )
        self.decode_stall = self._histogram(
            "decode_stall_seconds", "Running requests waited for it.", STEP_S, "cause"
        )
        self.step_retries = self._counter(
            "step_retries_total", "Steps that threw and were run again in parts."
        )
        self.passes = self._counter("forward_passes_total", "Passes through the language model.", "way")
        self.steps_ahead = self._counter(
            "steps_ahead_total", "Steps begun before the tokens before them were read."
        )
        self.rows_dropped = self._counter(
            "rows_dropped_total", "Rows of such steps whose sequences had ended."
        )
        for way in ("graph", "eager"):
            self.passes.labels(way)
        self.adapter_load = self._histogram(
            "adapter_load_seconds", "Bringing an adapter to the device.", LOAD_S, "stage"
        )

    def _of_caches(self) -> None:
        self.adapter_loads = self._counter("adapter_loads_total", "Loads that ended.", "outcome")
        self.adapter_load_failures = self._counter(
            "adapter_load_failures_total", "Loads that failed.", "reason"
        )
        self.adapter_evictions = self._counter(
            "adapter_evictions_total", "Adapters that left a tier.", "tier", "reason"
        )
        self.adapter_hits = self._counter("adapter_cache_hits_total", "The adapter was in the tier.", "tier")
        self.adapter_misses = self._counter(
            "adapter_cache_misses_total", "The adapter was not in the tier.", "tier"
        )
        self.prefix_hits = self._counter("prefix_cache_hits_tokens_total", "Prompt tokens found computed.")
        self.prefix_misses = self._counter("prefix_cache_misses_tokens_total", "Prompt tokens computed.")
        self.image_hits = self._counter("image_cache_hits_total", "Images that were not encoded again.")
        self.image_misses = self._counter("image_cache_misses_total", "Images that had to be encoded.")
        for outcome in ("ok", "failed"):
            self.adapter_loads.labels(outcome)
        for counter in (self.adapter_hits, self.adapter_misses):
            for tier in ("device", "host"):
                counter.labels(tier)

    def _of_vllm(self) -> None:
        def table(name: str, bounds: tuple[float, ...]) -> LatencyTable:
            return LatencyTable(f"vllm:{name}", "As vLLM's: all adapters together.", bounds, "model_name")

        self.vllm_first_token = table("time_to_first_token_seconds", FIRST_TOKEN_S)
        self.vllm_next_token = table("inter_token_latency_seconds", NEXT_TOKEN_S)
        self.vllm_latency = table("e2e_request_latency_seconds", REQUEST_S)

    def render_tables(self) -> str:
        """The part of the exposition that is in tables: latencies and the step's phases."""
        ours = (self.first_token, self.next_token, self.latency, self.queue)
        vllms = (self.vllm_first_token, self.vllm_next_token, self.vllm_latency)
        return "".join(table.render() for table in (*ours, *vllms, self.step))

    def tokens(self, label: str) -> TokenCounters:
        """The token counters of one label value, made if new."""
        return TokenCounters(self.prompt_tokens.labels(label), self.generation_tokens.labels(label))

    def drop(self, label: str) -> None:
        """Remove every series of one label value."""
        for table in (self.first_token, self.next_token, self.latency, self.queue):
            table.drop(label)
        for counter in (self.requests, self.prompt_tokens, self.generation_tokens):
            counter.remove_by_labels({"adapter": label})

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lorikeet_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"lorikeet_{name}", text, labels, registry=self._registry, buckets=buckets)
