"""Histogram: how long rows are, in buckets that double."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of whole numbers, with their percentiles (nearest rank)."""

    buckets: Mapping[int, int]
    """Upper bound, included -> how many lie there and above the bound before."""
    count: int
    total: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, values: Iterable[int]) -> Histogram:
        ordered = sorted(values)
        if not ordered:
            return cls({}, 0, 0, 0, 0, 0)
        buckets = Counter(_bound(value) for value in ordered)
        return cls(
            dict(sorted(buckets.items())), len(ordered), sum(ordered),
            _percentile(ordered, 50), _percentile(ordered, 95), ordered[-1],
        )  # fmt: skip

    def as_json(self) -> dict[str, object]:
        buckets = {str(bound): count for bound, count in self.buckets.items()}
        return {
            "buckets": buckets, "count": self.count, "total": self.total,
            "median": self.median, "p95": self.p95, "max": self.most,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"median {self.median}, p95 {self.p95}, max {self.most}, total {self.total}"


def _bound(value: int) -> int:
    """The smallest power of two from 16 up that is not below ``value``."""
    return max(16, 1 << (value - 1).bit_length()) if value > 1 else 16


def _percentile(ordered: list[int], percent: int) -> int:
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
