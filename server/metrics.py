"""Metrics: the engine's events and the wire's requests, as Prometheus series.

Owns: which event moves which series. Implements ``engine.observer.Observer``. Place in a request's way: beside it;
nothing in a request waits for it. Labels are bounded by ``AdapterLabels``; a client's string never becomes one.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from adapters.ref import AdapterRef
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
from engine.status import EngineStatus
from server.gauges import EngineFacts, StatusCollector
from server.instruments import Instruments, TokenCounters
from server.labels import AdapterLabels
from server.shadow_series import ShadowSeries

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"
"""Route label of a path that no route has."""


class Metrics:
    """``record`` is called on the engine's thread, the rest on the event loop."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._instruments = Instruments(self._registry)
        self._tokens: dict[str, TokenCounters] = {}
        self.labels = AdapterLabels(self._drop)
        self.shadows = ShadowSeries(self._registry, self.labels)

    def watch(
        self,
        num_slots: int,
        block_size: int,
        status: Callable[[], EngineStatus],
        is_ready: Callable[[], bool],
        store_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """Serve the gauges of an engine and its store; called once, when it is built."""
        facts = EngineFacts(self._model_name, num_slots, block_size)
        self._registry.register(StatusCollector(facts, self.labels, status, is_ready, store_bytes))

    def render(self) -> bytes:
        """The text exposition, format 0.0.4."""
        text: bytes = generate_latest(self._registry)
        return text + self._instruments.render_tables().encode() + self.shadows.render().encode()

    def forget(self, ref: AdapterRef) -> None:
        """The adapter is gone: so are its series."""
        self.labels.forget(ref)

    def count_http(self, route: str | None, method: str, status: int) -> None:
        """One answered request; ``route`` is the route's template, None where no route matched."""
        known = method if method in _METHODS else "OTHER"
        self._instruments.http_requests.labels(route or UNMATCHED, known, str(status)).inc()

    def count_deleted(self) -> None:
        """A package that nothing means has left the store. From any thread."""
        self._instruments.adapter_evictions.labels("disk", "unreferenced").inc()

    def _drop(self, label: str) -> None:
        self._tokens.pop(label, None)
        self._instruments.drop(label)
        self.shadows.drop(label)

    def _tokens_of(self, label: str) -> TokenCounters:
        tokens = self._tokens.get(label)
        if tokens is None:
            tokens = self._tokens[label] = self._instruments.tokens(label)
        return tokens

    # ---- the observer ------------------------------------------------------------------------------------------

    def record(self, event: Event) -> None:
        match event:
            case NextToken():
                self._next_token(event)
            case StepDone():
                self._step(event)
            case Passed():
                self._instruments.passes.labels(event.way).inc()
            case SteppedAhead():
                self._instruments.steps_ahead.inc()
                self._instruments.rows_dropped.inc(event.num_dropped)
            case FirstToken():
                self._first_token(event)
            case SequenceStarted():
                self._instruments.queue.observe(self.labels.label(event.adapter), event.queue_s)
            case SequenceEnded():
                self._ended(event)
            case _:
                self._record_rare(event)

    def _record_rare(self, event: Event) -> None:
        counters = self._instruments
        match event:
            case AdapterLookup():
                self._looked_up(event)
            case AdapterMoved():
                self._moved(event)
            case AdapterMoveFailed():
                counters.adapter_loads.labels("failed").inc()
                counters.adapter_load_failures.labels(event.reason).inc()
            case AdapterEvicted():
                counters.adapter_evictions.labels(event.tier, event.reason).inc()
            case ImageLookup():
                (counters.image_hits if event.was_cached else counters.image_misses).inc()
            case ImagesEncoded():
                counters.image_encode.observe(event.seconds)
            case DecodeStalled():
                counters.decode_stall.labels(event.cause).observe(event.seconds)
            case StepRetried():
                counters.step_retries.inc()

    def _next_token(self, event: NextToken) -> None:
        label = self.labels.label(event.adapter)
        self._instruments.next_token.observe(label, event.seconds)
        self._instruments.vllm_next_token.observe(self._model_name, event.seconds)
        self._tokens_of(label).generation.inc()

    def _first_token(self, event: FirstToken) -> None:
        label = self.labels.label(event.adapter)
        self._instruments.first_token.observe(label, event.seconds)
        self._instruments.vllm_first_token.observe(self._model_name, event.seconds)
        self._instruments.prefix_hits.inc(event.num_cached_tokens)
        self._instruments.prefix_misses.inc(event.num_prompt_tokens - event.num_cached_tokens)
        tokens = self._tokens_of(label)
        tokens.prompt.inc(event.num_prompt_tokens)
        tokens.generation.inc()

    def _ended(self, event: SequenceEnded) -> None:
        label = self.labels.label(event.adapter)
        self._instruments.latency.observe(label, event.seconds)
        self._instruments.vllm_latency.observe(self._model_name, event.seconds)
        self._instruments.requests.labels(label, event.reason).inc()

    def _step(self, event: StepDone) -> None:
        for phase, seconds in event.seconds.items():
            self._instruments.step.observe(phase, seconds)
        for phase, seconds in event.cpu_seconds.items():
            self._instruments.step_cpu.labels(phase).inc(max(0.0, seconds))
        self._instruments.batch_rows.observe(event.num_decode_rows)
        self._instruments.batch_adapters.observe(event.num_distinct_adapters)

    def _looked_up(self, event: AdapterLookup) -> None:
        self.labels.use(event.ref)
        if event.ref.is_base:
            return
        hits, misses = self._instruments.adapter_hits, self._instruments.adapter_misses
        (hits if event.was_on_device else misses).labels("device").inc()
        if not event.was_on_device:
            (hits if event.was_on_host else misses).labels("host").inc()

    def _moved(self, event: AdapterMoved) -> None:
        self._instruments.adapter_loads.labels("ok").inc()
        for stage, seconds in event.seconds.items():
            self._instruments.adapter_load.labels(stage).observe(seconds)
