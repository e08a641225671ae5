"""Transport: how messages get from EngineClient to an engine and its status back; and the one within this process.

Knows no stream and no loop. Place in a request's way: step 4, between the client and the inbox.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import TYPE_CHECKING, Protocol

from engine.messages import Inbound, Stop
from engine.sampling import GrammarSpec
from engine.status import EngineStatus, StatusBoard

if TYPE_CHECKING:  # what a server without an engine of its own need not load
    from engine.engine import Engine
    from engine.grammar import GrammarCompiler

STOP_TIMEOUT_S = 30.0  # for the step that is running


class Transport(Protocol):
    """Safe from any thread."""

    @property
    def is_alive(self) -> bool: ...

    def send(self, message: Inbound) -> None:
        """Into the engine's inbox; never blocks on the engine."""
        ...

    def compile_grammar(self, spec: GrammarSpec) -> None:
        """Blocks until it is compiled where the engine will look for it. Raises GrammarError, EngineDown."""
        ...

    def read_status(self, is_draining: bool) -> EngineStatus: ...

    def close(self) -> None:
        """Stop the engine and wait for it. Idempotent."""
        ...


class ThreadTransport:
    """The engine on a thread of this process."""

    def __init__(
        self,
        engine: Engine,
        thread: Thread,
        board: StatusBoard,
        grammars: GrammarCompiler,
        on_stopped: Callable[[], None],
    ) -> None:
        """``thread`` runs the engine already; ``on_stopped`` is called once it has ended."""
        self._engine = engine
        self._board = board
        self._grammars = grammars
        self._on_stopped = on_stopped
        self._thread = thread

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def send(self, message: Inbound) -> None:
        self._engine.inbox.put(message)

    def compile_grammar(self, spec: GrammarSpec) -> None:
        self._grammars.compile(spec)

    def read_status(self, is_draining: bool) -> EngineStatus:
        return self._board.read(self.is_alive, is_draining)

    def close(self) -> None:
        if self._thread.is_alive():
            self._engine.inbox.put(Stop())
            self._thread.join(timeout=STOP_TIMEOUT_S)
            self._on_stopped()
