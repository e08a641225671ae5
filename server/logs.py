"""Logs: one line an event, as text or JSON, to stderr. No prompt, output, key or host path gets in.

Owns the formats. A failure is written as its class and the places in code that it went through, without its message,
which may quote a client; level debug shows Python's whole traceback.
"""

from __future__ import annotations

import logging
import sys
import warnings
from datetime import UTC, datetime
from typing import Literal

import orjson

from engine.traces import trace_of as trace_of  # one line a failure, in both processes

_QUIET = (
    "uvicorn",
    "uvicorn.error",
    "uvicorn.access",
    "httpx2",
    "httpcore2",
    "PIL",
    "asyncio",
    "transformers",
)


def configure_logging(level: str, kind: Literal["text", "json"]) -> None:
    """Send every logger to stderr in our format; libraries speak from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if kind == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # about clients' pictures; they would name folders of this host
    logging.getLogger("lorikeet").setLevel(level.upper())
    for name in _QUIET:
        quiet = logging.getLogger(name)
        quiet.handlers.clear()
        quiet.propagate = True
        quiet.setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower():<7} {record.name} {record.getMessage()}"
        if record.exc_info:
            line += f" trace={trace_of(record.exc_info)}"
            if logging.getLogger("lorikeet").isEnabledFor(logging.DEBUG):
                line += "\n" + self.formatException(record.exc_info)
        return line


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event, _, rest = record.getMessage().partition(" ")
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event,
        }
        if rest:
            fields["text"] = rest
        if record.exc_info:
            fields["trace"] = trace_of(record.exc_info)
        return orjson.dumps(fields).decode()


def _time(record: logging.LogRecord) -> str:
    return (
        datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )
