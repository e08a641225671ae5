"""EngineProcess: the engine in a process of its own, as a Transport; watched, and started anew when it dies or hangs.

Owns the process, the pipe to it, and the acts that wait for an answer. One thread lives as long as this does: it starts
the process, reads what comes up, and starts the next one, after a pause that grows while starting fails. Whoever waits
when the process goes is told at once. Knows no stream: the client does.

Place in a request's way: steps 4 and 11.
"""

from __future__ import annotations

import itertools
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from engine.errors import Draining, EngineDown, EngineError
from engine.messages import Failed, Inbound, LoadAdapter, Outbound, Stop, Submit, UnloadAdapter
from engine.observer import Observer
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
from engine.status import HUNG_AFTER_S, EngineStatus, StatusBoard, idle_picture
from engine.traces import relay
from engine.transport import STOP_TIMEOUT_S

FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 30.0
"""Between two starts; it doubles while they fail, and begins again after one that became ready."""
BOOT_TIMEOUT_S: Final = 180.0
"""Until the first pulse: Python and torch are being read, from a disk that may be slow."""
ROOT: Final = Path(__file__).resolve().parent.parent
BOOT: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); from engine.child import main; main(int(sys.argv[2]))"
)

Reply = Callable[[object], None]

logger = logging.getLogger("lorikeet.engine")


class EngineStartError(Exception):
    """The first process did not become ready; ``str()`` says why."""


@dataclass(frozen=True, slots=True)
class Upward:
    """Whom what comes up is for."""

    deliver: Callable[[Sequence[Outbound]], None]
    fail_streams: Callable[[EngineError], None]
    observer: Observer


class EngineProcess:
    """``begin`` it, ``connect`` it, and it serves until ``close``. All methods are safe from any thread."""

    def __init__(self, begin: Begin, hung_after_s: float = HUNG_AFTER_S) -> None:
        self._begin = begin
        self._hung_after_s = hung_after_s
        self._upward: Upward | None = None
        self._lock = threading.Lock()  # guards the four below
        self._pipe: Pipe | None = None  # while an engine is ready behind it
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: dict[int, Reply] = {}
        self._board = StatusBoard(0, idle_picture(0))
        self._numbers = itertools.count()
        self._is_closing = threading.Event()
        self._first: Future[EngineFacts] = Future()
        self._connected = threading.Event()
        self._num_restarts = 0
        self._thread = threading.Thread(target=self._live, name="lorikeet-engine-watch", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def wait_ready(self) -> EngineFacts:
        """Until the base is loaded and the engine warm. Raises EngineStartError."""
        return self._first.result()

    def connect(self, upward: Upward) -> None:
        """From now on what comes up is passed on; until then nothing that anybody waits for can come."""
        self._upward = upward
        self._connected.set()

    # ---- down --------------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        return self._pipe is not None

    @property
    def pid(self) -> int | None:
        """The process's number; None between two of them."""
        process = self._process
        return None if process is None else process.pid

    def send(self, message: Inbound) -> None:
        match message:
            case LoadAdapter(ref, pin, reply):
                self._call(LoadCall(ref, pin), reply)  # type: ignore[arg-type]  # each act its own report
            case UnloadAdapter(ref, timeout_s, reply):
                self._call(UnloadCall(ref, timeout_s), reply)  # type: ignore[arg-type]
            case Submit(request) if request.on_logits is not None:
                raise ValueError("on_logits cannot cross to the engine's process")
            case _:
                pipe = self._pipe
                if pipe is not None:
                    pipe.send(message)
                elif isinstance(message, Submit) and self._upward is not None:
                    self._upward.deliver([Failed(message.request.request_id, _down())])

    def compile_grammar(self, spec: GrammarSpec) -> None:
        done: Future[object] = Future()
        self._call(CompileCall(spec), done.set_result)
        outcome = done.result()
        if isinstance(outcome, Exception):
            raise outcome

    def _call(self, act: Act, reply: Reply) -> None:
        with self._lock:
            pipe = self._pipe
            if pipe is not None:
                number = next(self._numbers)
                self._replies[number] = reply
                pipe.send(Call(number, act))
        if pipe is None:
            reply(_down())

    def read_status(self, is_draining: bool) -> EngineStatus:
        status = self._board.read(self.is_alive, is_draining)
        is_restarting = not self.is_alive and not self._is_closing.is_set()
        num_restarts = self._num_restarts
        num_recoveries = status.num_recoveries + num_restarts
        return replace(
            status, num_recoveries=num_recoveries, num_restarts=num_restarts, is_restarting=is_restarting
        )

    def close(self) -> None:
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        with self._lock:
            pipe, process = self._pipe, self._process
        if pipe is not None:
            pipe.send(Stop())
        elif process is not None:
            process.kill()  # it was still loading
        self._connected.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive() and process is not None:
            process.kill()
            self._thread.join(STOP_TIMEOUT_S)

    # ---- the watching thread -----------------------------------------------------------------------------------

    def _live(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._is_closing.is_set():
            was_ready = self._run_one()
            if not self._first.done():
                self._first.set_exception(
                    EngineStartError("the engine's process ended while it was starting")
                )
            if isinstance(self._first.exception(), EngineStartError):
                return
            if was_ready:
                pause_s = FIRST_PAUSE_S
            if not self._is_closing.is_set():
                self._num_restarts += 1
                logger.warning("engine.restarting pause_s=%.1f", pause_s)
                self._is_closing.wait(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    def _run_one(self) -> bool:
        """One process from start to end; whether it was ever ready."""
        ours, its = socket.socketpair()
        with its:
            command = [sys.executable, "-c", BOOT, str(ROOT), str(its.fileno())]
            process = subprocess.Popen(command, pass_fds=(its.fileno(),), stdin=subprocess.DEVNULL)
        pipe = Pipe(ours, "server")
        with self._lock:
            self._process = process
        if self._is_closing.is_set():
            process.kill()
        pipe.send(self._begin)
        try:
            self._read_all(pipe)
        except EOFError:
            pass
        except TimeoutError:
            logger.error("engine.hung after_s=%g pid=%d", self._hung_after_s, process.pid)
        except Exception:  # what came up made no sense: that engine cannot be trusted any more
            logger.exception("engine.misunderstood pid=%d", process.pid)
        finally:
            was_ready = self._pipe is pipe
            self._bury(process)
            pipe.close()
        return was_ready

    def _read_all(self, pipe: Pipe) -> None:
        timeout_s = max(BOOT_TIMEOUT_S, self._hung_after_s)
        while True:
            for value in pipe.receive(timeout_s):
                self._take(pipe, value)
            timeout_s = self._hung_after_s

    def _take(self, pipe: Pipe, value: object) -> None:
        match value:
            case Told(messages):
                self._upward_now().deliver(messages)
            case Seen(event):
                if self._upward is not None:
                    self._upward.observer.record(event)
            case Drawn(picture):
                self._board.publish(picture)
            case Pulse(age_s):
                self._check(age_s)
            case Answered(number, outcome):
                with self._lock:
                    reply = self._replies.pop(number, None)
                if reply is not None:
                    reply(outcome)
            case Logged(name, level, created_s, text):
                relay(name, level, created_s, text)
            case EngineFacts():
                self._welcome(pipe, value)
            case NotReady(reason):
                if not self._first.done():
                    self._first.set_exception(EngineStartError(reason))
            case _:
                raise TypeError(f"{type(value).__name__} does not come up")

    def _upward_now(self) -> Upward:
        self._connected.wait()
        if self._upward is None:
            raise EOFError("closed before it was connected")
        return self._upward

    def _check(self, age_s: float) -> None:
        self._board.beat(age_s)
        if age_s > self._hung_after_s:
            raise TimeoutError

    def _welcome(self, pipe: Pipe, facts: EngineFacts) -> None:
        """It is ready. One that loaded another base than the first is not let in: caches and names would lie."""
        if self._first.done() and self._first.result().spec.fingerprint != facts.spec.fingerprint:
            raise TypeError("the base on disk is another one than this server was started with")
        self._board = StatusBoard(facts.num_blocks, facts.picture, facts.kernels)
        with self._lock:
            self._pipe = pipe
        if not self._first.done():
            self._first.set_result(facts)
        logger.info("engine.process_ready pid=%s restarts=%d", self.pid, self._num_restarts)

    def _bury(self, process: subprocess.Popen[bytes]) -> None:
        """Make sure that it is gone, and tell everybody who waited for it."""
        with self._lock:
            self._pipe, self._process = None, None
            replies, self._replies = list(self._replies.values()), {}
        if process.poll() is None and not self._is_closing.is_set():
            process.kill()
        num_slots = self._begin.engine.num_slots
        self._board.publish(idle_picture(num_slots))
        error = Draining("the server is stopping") if self._is_closing.is_set() else _down()
        if self._upward is not None:
            self._upward.fail_streams(error)
        for reply in replies:
            reply(error)
        try:
            status = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if not self._is_closing.is_set():
            logger.error("engine.died pid=%d status=%d", process.pid, status)


def _down() -> EngineDown:
    return EngineDown("the engine stopped and is being restarted; try again soon")
