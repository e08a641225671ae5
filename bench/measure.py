"""The measures: from streams to figures, from repeats to a median with its spread, from pairs to a ratio. Pure.

Owns what each figure means. Milliseconds end in ``_ms``, tokens and calls a second in ``_per_s``; failed streams count
nowhere but in ``num_failed`` and against goodput.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.load import Run
from bench.streamed import Streamed

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good answer takes at most."""

    first_token_ms: float = 1000.0
    per_token_ms: float = 100.0

    def is_met(self, streamed: Streamed) -> bool:
        if streamed.failure is not None:
            return False
        per_token_s = streamed.per_token_s or 0.0
        return 1000 * _felt_first_token_s(streamed) <= self.first_token_ms and (
            1000 * per_token_s <= self.per_token_ms
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie, interpolated between neighbours (numpy's "linear").

    Raises ValueError for no values, or a share outside 0..1.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"needs values and a share from 0 to 1, not {len(values)} values and {share}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def measure(run: Run, slo: Slo) -> dict[str, float]:
    """One run's figures. Distributions of nothing are left out."""
    whole = [streamed for streamed in run.streams if streamed.failure is None]
    num_tokens = sum(streamed.num_output_tokens for streamed in whole)
    num_good = sum(slo.is_met(streamed) for streamed in run.streams)
    figures: dict[str, float] = {
        "num_calls": len(run.streams),
        "num_failed": len(run.streams) - len(whole),
        "seconds": run.seconds,
        "output_tokens": num_tokens,
        "prompt_tokens": sum(streamed.num_prompt_tokens for streamed in whole),
        "cached_tokens": sum(streamed.num_cached_tokens for streamed in whole),
        "output_tokens_per_s": num_tokens / run.seconds if run.seconds else 0.0,
        "calls_per_s": len(whole) / run.seconds if run.seconds else 0.0,
        "goodput_per_s": num_good / run.seconds if run.seconds else 0.0,
        "goodput_share": num_good / len(run.streams) if run.streams else 0.0,
    }
    gaps_ms = [1000 * gap for streamed in whole for gap in streamed.gaps_s]
    figures |= _distribution("first_token_ms", [1000 * _felt_first_token_s(streamed) for streamed in whole])
    figures |= _distribution("between_tokens_ms", gaps_ms)
    figures |= _distribution("per_token_ms", [1000 * s for streamed in whole if (s := streamed.per_token_s)])
    figures |= _distribution("total_ms", [1000 * streamed.total_s for streamed in whole])
    if gaps_ms:
        figures["worst_stall_ms"] = max(gaps_ms)
    rare = _rare(whole)
    if rare:
        figures |= _distribution("rare_first_token_ms", [1000 * _felt_first_token_s(s) for s in rare])
    late = [1000 * (streamed.sent_s - streamed.due_s) for streamed in whole if streamed.due_s is not None]
    return figures | _distribution("sent_late_ms", late)


def _felt_first_token_s(streamed: Streamed) -> float:
    """From when the call was due: a client that sends late does not make the server look better."""
    begin_s = streamed.sent_s if streamed.due_s is None else min(streamed.due_s, streamed.sent_s)
    return streamed.token_times[0] - begin_s


def _distribution(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}_p{100 * share:g}": percentile(values, share) for share in (0.5, 0.95, 0.99)}


def _rare(streams: Sequence[Streamed]) -> list[Streamed]:
    """The calls to the less asked half of the adapters; none where all are asked alike."""
    counts = Counter(streamed.adapter for streamed in streams if streamed.adapter is not None)
    if len(counts) < 2 or len(set(counts.values())) == 1:
        return []
    names = {name for name, _ in counts.most_common()[(len(counts) + 1) // 2 :]}
    return [streamed for streamed in streams if streamed.adapter in names]


def by_adapter(run: Run) -> dict[str, dict[str, float]]:
    """First tokens of each adapter: who pays for a neighbour's flood."""
    groups: dict[str, list[float]] = {}
    for streamed in run.streams:
        if streamed.failure is None:
            groups.setdefault(streamed.adapter or "base", []).append(1000 * _felt_first_token_s(streamed))
    return {
        name: {"num_calls": len(values)} | _distribution("first_token_ms", values)
        for name, values in groups.items()
    }


# ---- several runs


@dataclass(frozen=True, slots=True)
class Repeats:
    """The median of each figure over the repeats, and how far apart they lie."""

    median: dict[str, float]
    spread: dict[str, float]
    """(largest - smallest) / median; 0 for a single repeat."""
    num_repeats: int


def repeats(runs: Sequence[Figures]) -> Repeats:
    """Raises ValueError for no runs. A figure that some runs lack is left out."""
    if not runs:
        raise ValueError("no runs to take a median of")
    names = [name for name in runs[0] if all(name in run for run in runs)]
    median = {name: statistics.median(run[name] for run in runs) for name in names}
    spread = {
        name: (max(run[name] for run in runs) - min(run[name] for run in runs)) / abs(median[name])
        for name in names
        if median[name]
    }
    return Repeats(median, spread, len(runs))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ratios of runs that stood side by side in time: their median and extremes.

    Raises ValueError unless there are as many of one as of the other.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"pairs need as many of one as of the other, not {len(ours)} and {len(theirs)}")
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "num_pairs": len(ratios),
    }


@dataclass(frozen=True, slots=True)
class Parity:
    """How many answers of the same calls are the same text."""

    num_compared: int
    num_equal: int
    differing: tuple[int, ...]
    """Indexes of the first few that differ."""


def parity(ours: Run, theirs: Run) -> Parity:
    """Of the calls that are whole on both sides."""
    others = {streamed.index: streamed.text_sha256 for streamed in theirs.streams if streamed.failure is None}
    pairs = {
        streamed.index: streamed.text_sha256 == others[streamed.index]
        for streamed in ours.streams
        if streamed.failure is None and streamed.index in others
    }
    differing = [index for index, is_equal in pairs.items() if not is_equal]
    return Parity(len(pairs), len(pairs) - len(differing), tuple(differing[:8]))


def failures(run: Run) -> dict[str, int]:
    """Why streams do not count, most frequent first."""
    counts = Counter(streamed.failure for streamed in run.streams if streamed.failure is not None)
    return dict(counts.most_common(5))
