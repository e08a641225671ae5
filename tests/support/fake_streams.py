"""Streams without a device: what is written in one is kept back until the test lets the stream run.

Reads and allocations happen at once, as they do for a host; writes into tensors (copies, zeros) go into the queue of
the stream in use. Waiting for an event stops a queue until the event's own queue has come to it. There is no call that
would have the host wait: code that tried one would fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class FakeEvent:
    def __init__(self) -> None:
        self.is_done = False
        self.error: Exception | None = None

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.is_done


class FakeStream:
    def __init__(self) -> None:
        self._queue: deque[Callable[[], bool]] = deque()
        self.events: list[FakeEvent] = []

    def launch(self, work: Callable[[], object]) -> None:
        def run() -> bool:
            work()
            return True

        self._queue.append(run)

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        self.events.append(event)
        self.launch(lambda: setattr(event, "is_done", True))
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self._queue.append(event.query)

    def run(self) -> bool:
        """As far as it comes; whether that is to its end."""
        while self._queue and self._queue[0]():
            self._queue.popleft()
        return not self._queue


class FakeStreams:
    """A Streams."""

    def __init__(self) -> None:
        self.copies = FakeStream()
        self.steps = FakeStream()

    @contextmanager
    def use_copies(self) -> Iterator[None]:
        with _Keeping(self.copies):
            yield

    def run(self) -> None:
        """Both, to their ends."""
        for _ in range(100):
            if all([self.copies.run(), self.steps.run()]):
                return
        raise AssertionError("the streams wait for each other")


class _Keeping(TorchDispatchMode):
    def __init__(self, stream: FakeStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if not func._schema.is_mutable:
            return func(*args, **options)
        self._stream.launch(lambda: func(*args, **options))
        return args[0]
