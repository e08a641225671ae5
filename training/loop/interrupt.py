"""StopRequest: Ctrl-C and SIGTERM as a wish that is granted at the next step boundary.

Owns: the two signals while a run lasts. A second Ctrl-C is Python's own again, for whoever cannot wait. Does not know:
steps. Place in a training run: around the loop.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Use as a context; in a thread other than the main one signals are left alone, as Python wants it."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, object] = {}
        self.is_made = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for each in _SIGNALS:
                self._before[each] = signal.signal(each, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_made = True
        self._restore()

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]  # whatever signal.signal returned, it takes
        self._before.clear()
