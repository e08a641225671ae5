"""Lane: where copies into slots run. In place on a CPU; on CUDA in a stream of their own, which no step waits for.

Owns the order between the two streams, and nothing else. Three rules make it safe without a word to the allocator:

- What a slice launches, memory that it takes included, comes after every step launched before it. So a slot's old
  tenant, which left before, is read to its end; and pages, which belong to the copies' stream, come back, once they
  are freed, to nobody but a later slice.
- A step reads a slot only when the mark behind its last slice has passed, or when the step is ordered behind the mark.
- Where a slice fails, later steps come after what it had launched: what it wrote to may be given away now.

Does not know slots. Place in a request's way: step 5, at a step's boundary; the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, Protocol, TypeVar

import torch


class Event(Protocol):
    """torch.cuda.Event, of which a test has its own."""

    def query(self) -> bool: ...


E = TypeVar("E", bound=Event)


class Stream(Protocol[E]):
    """torch.cuda.Stream, of which a test has its own."""

    def record_event(self) -> E: ...

    def wait_event(self, event: E) -> None: ...


class Streams(Protocol[E]):
    """A device's streams."""

    @property
    def copies(self) -> Stream[E]: ...

    @property
    def steps(self) -> Stream[E]:
        """The one that is current now."""

    def use_copies(self) -> AbstractContextManager[object]:
        """What is launched and allocated inside belongs to the copies' stream."""


class Mark(Protocol):
    """Behind the slices that were launched before it."""

    def has_passed(self) -> bool:
        """Whether all of them are over; never waits. Raises what the device raises."""

    def put_before_steps(self) -> None:
        """Steps launched from now on come after it; the host does not wait."""


class Lane(Protocol):
    def slice(self) -> AbstractContextManager[object]:
        """Around what writes into slots."""

    def mark(self) -> Mark: ...


def lane_of(device: torch.device) -> Lane:
    return SideLane(CudaStreams(device)) if device.type == "cuda" else InPlace()


class InPlace:
    """A Lane and its Mark: what is written is written."""

    def slice(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> InPlace:
        return self

    def has_passed(self) -> bool:
        return True

    def put_before_steps(self) -> None:
        pass


class CudaStreams:
    """A Streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    @property
    def copies(self) -> torch.cuda.Stream:
        return self._copies

    @property
    def steps(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def use_copies(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies)


class SideLane(Generic[E]):
    """A Lane beside the steps."""

    def __init__(self, streams: Streams[E]) -> None:
        self._streams = streams

    @contextmanager
    def slice(self) -> Iterator[None]:
        steps, copies = self._streams.steps, self._streams.copies
        copies.wait_event(steps.record_event())
        try:
            with self._streams.use_copies():
                yield
        except BaseException:
            steps.wait_event(copies.record_event())
            raise

    def mark(self) -> Mark:
        return SideMark(self._streams, self._streams.copies.record_event())


class SideMark(Generic[E]):
    def __init__(self, streams: Streams[E], event: E) -> None:
        self._streams = streams
        self._event = event

    def has_passed(self) -> bool:
        return self._event.query()

    def put_before_steps(self) -> None:
        self._streams.steps.wait_event(self._event)
