"""The engine's own process: it loads the base, builds the engine, and steps; the server's process is at the pipe's
other end. Run by ``engine.process``; never imported by it.

Owns this process: its signals, its log lines (sent up), and its end. It ends when told to, when the engine's loop ends,
and at once when the server's process is gone. Place in a request's way: steps 5 to 10.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapters.reading import PackageReader
from adapters.sites import discover_sites
from base.errors import BaseError
from base.loader import load_base
from engine.build import EngineParts, build_parts
from engine.errors import EngineError
from engine.exhaustion import is_out_of_memory
from engine.messages import (
    Abort,
    LoadAdapter,
    LoadReport,
    Outbound,
    Stop,
    Submit,
    UnloadAdapter,
    UnloadReport,
)
from engine.observer import Event
from engine.pipe import Pipe
from engine.remote import (
    Act,
    Answered,
    Begin,
    Call,
    CompileCall,
    Drawn,
    EngineFacts,
    LoadCall,
    Logged,
    NotReady,
    Pulse,
    Seen,
    Told,
    UnloadCall,
)
from engine.sampling import GrammarSpec
from engine.traces import trace_of
from engine.workers import leave_one_to_others

PULSE_S = 0.25
NUM_COMPILERS = 2
PR_SET_PDEATHSIG = 1  # linux/prctl.h

logger = logging.getLogger("lorikeet.engine")


def main(descriptor: int) -> None:
    """On the main thread; ends the process."""
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.SIG_IGN
        )  # meant for the server's process, which lets the streams end first
    pipe = Pipe(socket.socket(fileno=descriptor), "engine")
    (begin,) = pipe.receive()
    if not isinstance(begin, Begin):
        raise TypeError(f"the first value down is no Begin but {type(begin).__name__}")
    _send_logs(pipe, begin.log_level)
    heart = Heart(pipe)
    try:
        parts, facts = _build(begin, pipe)
    except (BaseError, ValueError, MemoryError, RuntimeError) as error:
        logger.exception("engine.not_started")
        pipe.send(NotReady(_reason(error)))
        pipe.close()
        sys.exit(1)
    pipe.send(facts)
    heart.watch(parts)
    threading.Thread(target=Ears(pipe, parts).listen, name="lorikeet-ears", daemon=True).start()
    parts.engine.run()
    parts.close()
    pipe.close()
    os._exit(0)  # threads that wait for the pipe or a device must not hold up the end


def _die_with_parent() -> None:
    """Linux kills us with the server's process; elsewhere, and as well, the pipe's end tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _build(begin: Begin, pipe: Pipe) -> tuple[EngineParts, EngineFacts]:
    base = load_base(begin.base)
    if base.device.type == "cpu":
        leave_one_to_others()
    sites = discover_sites(base.module)
    reader = PackageReader(Path(begin.packages), sites)
    parts = build_parts(base, reader, begin.engine, Eyes(pipe), lambda messages: _tell(pipe, messages))
    parts.board.on_publish = lambda picture: pipe.send(Drawn(picture))
    facts = EngineFacts(
        spec=base.spec,
        sites=sites,
        device=str(base.device),
        memory=parts.memory,
        max_model_len=parts.max_model_len,
        num_blocks=parts.num_blocks,
        kernels=parts.kernels,
        picture=parts.board.picture,
    )
    return parts, facts


def _tell(pipe: Pipe, messages: Sequence[Outbound]) -> None:
    pipe.send(Told(tuple(messages)))


def _reason(error: Exception) -> str:
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return "the device has no memory for the engine: lower kv_memory, num_slots or device_memory"
    is_ours = isinstance(error, BaseError | ValueError | MemoryError)
    return (
        str(error)
        if is_ours and str(error)
        else f"the engine cannot start ({type(error).__name__}); see the log"
    )


class Eyes:
    """The engine's observer here: what it sees goes up."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def record(self, event: Event) -> None:
        self._pipe.send(Seen(event))


class Ears:
    """Takes what comes down, on a thread of its own."""

    def __init__(self, pipe: Pipe, parts: EngineParts) -> None:
        self._pipe = pipe
        self._parts = parts
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="lorikeet-grammar")

    def listen(self) -> None:
        """Until the server's process is gone, and then this one goes at once: nobody reads its tokens."""
        try:
            while True:
                for value in self._pipe.receive():
                    self._take(value)
        except EOFError:
            os._exit(1)

    def _take(self, value: object) -> None:
        match value:
            case Submit() | Abort() | Stop():
                self._parts.engine.inbox.put(value)
            case Call(number, act):
                self._act(number, act)
            case _:
                raise TypeError(f"{type(value).__name__} does not come down")

    def _act(self, number: int, act: Act) -> None:
        def reply(outcome: LoadReport | UnloadReport | Exception | None) -> None:
            self._pipe.send(Answered(number, outcome))

        match act:
            case LoadCall(ref, pin):
                self._parts.engine.inbox.put(LoadAdapter(ref, pin, reply))
            case UnloadCall(ref, timeout_s):
                self._parts.engine.inbox.put(UnloadAdapter(ref, timeout_s, reply))
            case CompileCall(spec):
                self._compilers.submit(self._compile, spec, reply)

    def _compile(self, spec: GrammarSpec, reply: Callable[[Exception | None], None]) -> None:
        try:
            self._parts.grammars.compile(spec)
        except EngineError as error:
            reply(error)
        except Exception as error:  # the asker must not wait for ever
            logger.exception("grammar.failed")
            reply(RuntimeError(type(error).__name__))
        else:
            reply(None)


class Heart:
    """Beats on a thread of its own from the first moment, so that a frozen process is told from one that loads."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._parts: EngineParts | None = None
        threading.Thread(target=self._beat, name="lorikeet-heart", daemon=True).start()

    def watch(self, parts: EngineParts) -> None:
        """From now on the engine's loop has to turn."""
        parts.board.beat()
        self._parts = parts

    def _beat(self) -> None:
        while True:
            age_s = 0.0 if self._parts is None else self._parts.board.heartbeat_age_s
            self._pipe.send(Pulse(age_s))
            time.sleep(PULSE_S)


class _UpHandler(logging.Handler):
    """Log lines are written by the server's process, in its format."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += f" trace={trace_of(record.exc_info)}"
        self._pipe.send(Logged(record.name, record.levelno, record.created, text))


def _send_logs(pipe: Pipe, level: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_UpHandler(pipe)]
    root.setLevel(logging.WARNING)
    logging.getLogger("lorikeet").setLevel(level)
