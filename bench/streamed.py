"""Streamed: what came back for one call, and when. Read from the raw chunks after the stream has ended.

Owns the judgement whether a stream is whole. While a stream runs nothing is parsed: chunks are kept with their times,
so that the client's own work is not measured as the server's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from bench.trace import Call


@dataclass(frozen=True, slots=True)
class Arrival:
    """Bytes as they came off the socket."""

    at_s: float
    data: bytes


@dataclass(frozen=True, slots=True)
class Streamed:
    """One call's outcome. Times are seconds on one monotonic clock."""

    index: int
    adapter: str | None
    sent_s: float
    token_times: tuple[float, ...]
    """When each content delta came; the first is the first token."""
    end_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    text_sha256: str
    """Of the text of all choices, in order."""
    failure: str | None = None
    """Why it does not count; None for a whole stream."""
    due_s: float | None = None
    """When an open loop meant to send it; lateness is the client's, and is shown."""

    @property
    def first_token_s(self) -> float:
        """From sending to the first token."""
        return self.token_times[0] - self.sent_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between one content delta and the next."""
        return tuple(b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False))

    @property
    def per_token_s(self) -> float | None:
        """Mean time between tokens, however they were bundled; None for a single token."""
        num = self.num_output_tokens - 1
        return (self.token_times[-1] - self.token_times[0]) / num if num > 0 else None

    @property
    def total_s(self) -> float:
        return self.end_s - self.sent_s


def read_stream(
    call: Call,
    adapter: str | None,
    sent_s: float,
    arrivals: Sequence[Arrival],
    *,
    is_length_exact: bool,
    due_s: float | None = None,
) -> Streamed:
    """What the chunks say. A stream that is not whole carries a ``failure``."""
    reading = _Reading()
    for at_s, event in _events(arrivals):
        reading.take(at_s, event)
    failure = reading.failure or _shortcoming(call, reading, is_length_exact=is_length_exact)
    text = "\0".join(reading.texts[index] for index in sorted(reading.texts))
    return Streamed(
        index=call.index,
        adapter=adapter,
        sent_s=sent_s,
        token_times=tuple(reading.token_times),
        end_s=arrivals[-1].at_s if arrivals else sent_s,
        num_prompt_tokens=reading.num_prompt,
        num_cached_tokens=reading.num_cached,
        num_output_tokens=reading.num_output,
        text_sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        failure=failure,
        due_s=due_s,
    )


def failed(
    call: Call, adapter: str | None, sent_s: float, end_s: float, why: str, due_s: float | None = None
) -> Streamed:
    """The outcome of a call that gave no stream."""
    return Streamed(call.index, adapter, sent_s, (), end_s, 0, 0, 0, "", why, due_s)


class _Reading:
    """What the events said so far."""

    def __init__(self) -> None:
        self.token_times: list[float] = []
        self.texts: dict[int, str] = {}
        self.finished: set[int] = set()
        self.is_done = False
        self.failure: str | None = None
        self.num_prompt = self.num_cached = self.num_output = 0

    def take(self, at_s: float, event: str) -> None:
        if self.is_done:
            self.failure = self.failure or "something came after [DONE]"
        elif event == "[DONE]":
            self.is_done = True
        else:
            self._take_frame(at_s, event)

    def _take_frame(self, at_s: float, event: str) -> None:
        try:
            frame = json.loads(event)
        except json.JSONDecodeError:
            self.failure = self.failure or f"a frame is not JSON: {event[:80]!r}"
            return
        if "error" in frame:
            self.failure = self.failure or f"an error in the stream: {json.dumps(frame['error'])[:200]}"
            return
        self._take_usage(frame.get("usage") or {})
        for choice in frame.get("choices") or ():
            self._take_choice(at_s, choice)

    def _take_usage(self, usage: dict[str, object]) -> None:
        prompt, output, details = (
            usage.get(name) for name in ("prompt_tokens", "completion_tokens", "prompt_tokens_details")
        )
        self.num_prompt = prompt if isinstance(prompt, int) else self.num_prompt
        self.num_output = output if isinstance(output, int) else self.num_output
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        self.num_cached = cached if isinstance(cached, int) else self.num_cached

    def _take_choice(self, at_s: float, choice: dict[str, object]) -> None:
        index, delta = choice.get("index", 0), choice.get("delta") or {}
        content = delta.get("content") if isinstance(delta, dict) else None
        if not isinstance(index, int):
            self.failure = self.failure or f"a choice's index is {index!r}"
            return
        if isinstance(content, str) and content:
            self.token_times.append(at_s)
            self.texts[index] = self.texts.get(index, "") + content
        if choice.get("finish_reason"):
            self.finished.add(index)


def _events(arrivals: Sequence[Arrival]) -> list[tuple[float, str]]:
    """(when it was complete, its data) of every server-sent event, whatever the line ends and the chunks' borders."""
    events: list[tuple[float, str]] = []
    rest = b""
    for arrival in arrivals:
        *lines, rest = (rest + arrival.data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                events.append((arrival.at_s, line[5:].strip().decode("utf-8", "replace")))
    return events


def _shortcoming(call: Call, reading: _Reading, *, is_length_exact: bool) -> str | None:
    """Why an ended stream is not whole."""
    if not reading.is_done:
        return "the stream ended without [DONE]"
    if len(reading.finished) != call.fan_out:
        return f"{len(reading.finished)} of {call.fan_out} choices have a finish_reason"
    if not reading.token_times:
        return "no content came"
    wanted = call.num_tokens * call.fan_out
    if reading.num_output == 0:
        return "no usage came: tokens cannot be counted"
    if is_length_exact and reading.num_output != wanted:
        return f"{reading.num_output} tokens came of {wanted}"
    return None
