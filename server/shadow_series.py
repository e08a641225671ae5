"""ShadowSeries: the metrics of shadow versions, by the adapter whose split they belong to. Nothing is decided here."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from adapters.ref import AdapterRef
from server.histograms import LatencyTable
from server.labels import AdapterLabels

AGREEMENT = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ShadowSeries:
    def __init__(self, registry: CollectorRegistry, labels: AdapterLabels) -> None:
        self._labels = labels
        self._requests = Counter(
            "lorikeet_shadow_requests_total",
            "Copies asked of a shadow version, by what came of them.",
            ("adapter", "outcome"),
            registry=registry,
        )
        self._agreement = LatencyTable(
            "lorikeet_shadow_agreement_ratio",
            "Share of an answer's tokens before the shadow's first different one.",
            AGREEMENT,
            "adapter",
        )
        self._seconds = {
            "shadow": LatencyTable(
                "lorikeet_shadow_seconds", "Prefill and decode of the shadow's answer.", SECONDS, "adapter"
            ),
            "primary": LatencyTable(
                "lorikeet_shadow_primary_seconds",
                "The same of the answer that was copied.",
                SECONDS,
                "adapter",
            ),
        }

    def count(self, primary: AdapterRef, outcome: str) -> None:
        self._requests.labels(self._labels.label(primary), outcome).inc()

    def observe_agreement(self, primary: AdapterRef, ratio: float) -> None:
        self._agreement.observe(self._labels.label(primary), ratio)

    def observe_seconds(self, primary: AdapterRef, which: str, seconds: float) -> None:
        self._seconds[which].observe(self._labels.label(primary), seconds)

    def render(self) -> str:
        return "".join(table.render() for table in (self._agreement, *self._seconds.values()))

    def drop(self, label: str) -> None:
        self._requests.remove_by_labels({"adapter": label})
        for table in (self._agreement, *self._seconds.values()):
            table.drop(label)
