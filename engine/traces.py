"""Log lines across processes, and a failure in one line: its class and the places in code that it went through, without
its message, which may quote a client.

Knows no format; the server's process has that. Place in a request's way: none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import TracebackType

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def relay(name: str, level: int, created_s: float, text: str) -> None:
    """Write a line of another process as if it had been logged here."""
    facts = {"name": name, "levelno": level, "levelname": logging.getLevelName(level), "msg": text}
    record = logging.makeLogRecord({**facts, "created": created_s})
    log = logging.getLogger(name)
    if log.isEnabledFor(level):
        log.handle(record)


def trace_of(exc_info: ExcInfo) -> str:
    """``ValueError@server.routes.chat:41>engine.client:17``: the class, then the places from the outside in."""
    kind, error, _ = exc_info
    if kind is None or error is None:
        return "-"
    return f"{kind.__name__}@" + ">".join(_places(error.__traceback__))


def _places(trace: TracebackType | None) -> Iterator[str]:
    while trace is not None:
        yield f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"
        trace = trace.tb_next
