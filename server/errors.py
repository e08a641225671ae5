"""Errors on the wire: one exception with a status, one table that turns every other error into it, one envelope.

The body is always ``{"error": {"message", "type", "param", "code"}}`` and at most 4 KiB; it never holds a traceback, a
path of the host, or the client's own text at length. Before a response has started, ``error_response`` answers; after
its first byte, the same ``error_body`` goes into an event of the stream.

Knows the error trees of the rooms below; knows nothing of requests. Place in a request's way: step 12.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from adapters.errors import (
    AdapterBusy,
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    AdapterNotLoaded,
    AdapterRejected,
    DriverMissing,
    FetchFailed,
    InsufficientMemory,
    InsufficientStorage,
    InvalidAdapterName,
    NothingToRollBack,
    SourceOff,
    SourceRejected,
)
from base.errors import BaseError, InvalidImage, PromptError
from engine.errors import (
    AdapterUnavailable,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    EngineDown,
    GrammarError,
    NumericalError,
    OutOfMemory,
    QueueFull,
)
from server.wording import encodable, without_host_paths
from server.wording import shorten as shorten  # errors and what they echo are written together

logger = logging.getLogger("lorikeet.server")

MAX_BODY_BYTES = 4096
MAX_MESSAGE_CHARS = 1000
MAX_PARAM_CHARS = 128
MAX_DETAIL_CHARS = 200
MAX_DETAILS = 10

RETRY_SOON_S = 1.0
"""Retry-After of a 503 whose cause passes by itself, where nothing better is known."""

INTERNAL_MESSAGE = "the server made a mistake; this request failed, others are not affected"

_NO_RETRY = MappingProxyType({"x-should-retry": "false"})


class WireError(Exception):
    """An answer that is an error. ``extra`` holds further members of the error object: ``reason``, ``details``."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})
        self.extra: dict[str, object] = dict(extra or {})

    def with_param(self, param: str | None) -> WireError:
        """The same error naming ``param``, unless it names one already."""
        if self.param is not None or param is None:
            return self
        return WireError(
            self.status, self.code, self.message, param=param, headers=self.headers, extra=self.extra
        )


def invalid_request(message: str, param: str | None = None) -> WireError:
    return WireError(400, "invalid_request", message, param=param)


def unsupported(message: str, param: str | None = None) -> WireError:
    return WireError(400, "unsupported", message, param=param)


def retry_after(seconds: float) -> dict[str, str]:
    """A Retry-After header: whole seconds, rounded up, at least one."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}


# ---- the table -------------------------------------------------------------------------------------------------


def to_wire(exc: Exception) -> WireError:
    """What a client is told of ``exc``. An error that nobody foresaw is logged here and becomes a 500 ``internal``."""
    if isinstance(exc, WireError):
        return exc
    if isinstance(exc, AdapterUnavailable) and isinstance(exc.cause, AdapterError):
        return _from_adapters(exc.cause) or _internal(exc)
    known = _from_engine(exc) or _from_adapters(exc) or _from_base(exc) or _from_framework(exc)
    return known or _internal(exc)


def _from_engine(exc: Exception) -> WireError | None:
    text = without_host_paths(str(exc))
    match exc:
        case QueueFull():
            return WireError(429, "queue_full", text, headers=retry_after(exc.retry_after_s))
        case Draining():
            return WireError(503, "draining", text, headers=retry_after(RETRY_SOON_S))
        case EngineDown():
            return WireError(503, "engine_restarting", text, headers=retry_after(RETRY_SOON_S))
        case ContextTooLong():
            return WireError(400, "context_length_exceeded", text)
        case GrammarError():
            return invalid_request(text)
        case DeadlineExceeded():
            return WireError(504, "deadline_exceeded", text)
        case OutOfMemory():
            return WireError(503, "insufficient_memory", text, headers=retry_after(RETRY_SOON_S))
        case NumericalError():
            return WireError(500, "numerical_error", text)
    return None


def _from_adapters(exc: Exception) -> WireError | None:
    text = without_host_paths(str(exc))
    match exc:
        case AdapterNotFound() | AdapterNotLoaded():
            return WireError(404, "model_not_found", text)
        case NothingToRollBack():
            return invalid_request(text)
        case InvalidAdapterName():
            return WireError(400, "invalid_request", text, param="name")
        case AdapterExists():
            return WireError(409, "adapter_exists", text, headers=_NO_RETRY)
        case AdapterBusy():
            return WireError(409, "adapter_busy", text, headers=_NO_RETRY)
        case AdapterRejected():
            details = [without_host_paths(line) for line in exc.details]
            return WireError(
                422, "adapter_rejected", text, extra={"reason": str(exc.reason), "details": details}
            )
        case SourceOff() | DriverMissing():
            return WireError(400, "unsupported", text, param="source")
        case SourceRejected():
            return WireError(400, "invalid_request", text, param="source")
        case FetchFailed():
            return WireError(424, "source_fetch_failed", text, param="source")
        case InsufficientMemory():
            return WireError(503, "insufficient_memory", text, headers=retry_after(RETRY_SOON_S))
        case InsufficientStorage():
            return WireError(507, "insufficient_storage", text)
    return None


def _from_base(exc: Exception) -> WireError | None:
    if isinstance(exc, InvalidImage):
        return WireError(400, "invalid_image", without_host_paths(str(exc)))
    if isinstance(exc, PromptError):
        return invalid_request(without_host_paths(str(exc)))
    return None


_HTTP_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "insufficient_scope",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "rate_limited",
}


def _from_framework(exc: Exception) -> WireError | None:
    if isinstance(exc, HTTPException):
        code = _HTTP_CODES.get(exc.status_code, "invalid_request" if exc.status_code < 500 else "internal")
        return WireError(exc.status_code, code, str(exc.detail), headers=exc.headers)
    if isinstance(exc, RequestValidationError):
        return _from_validation(exc)
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return WireError(507, "insufficient_storage", "the server's disk is full")
    return None


def _from_validation(exc: RequestValidationError) -> WireError:
    """A path or query parameter that FastAPI refused; bodies are read by the routes themselves."""
    first = exc.errors()[0] if exc.errors() else {"loc": (), "msg": "the request is not valid"}
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return invalid_request(str(first["msg"]), param)


def _internal(exc: Exception) -> WireError:
    logger.error("request.failed error=%s", type(exc).__name__, exc_info=exc)
    if isinstance(exc, BaseError):
        return WireError(500, "internal", without_host_paths(str(exc)))
    return WireError(500, "internal", INTERNAL_MESSAGE)


# ---- the envelope ----------------------------------------------------------------------------------------------


def error_type(status: int) -> str:
    """OpenAI's ``type`` for a status."""
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_body(err: WireError) -> bytes:
    """The envelope as JSON, at most 4 KiB whatever the error holds."""
    limit = MAX_MESSAGE_CHARS
    body = orjson.dumps(_envelope(err, limit, MAX_DETAILS))
    for num_details in (5, 2, 0):
        if len(body) <= MAX_BODY_BYTES:
            return body
        limit //= 2
        body = orjson.dumps(_envelope(err, limit, num_details))
    return body


def _envelope(err: WireError, limit: int, num_details: int) -> dict[str, object]:
    fields: dict[str, object] = {
        "message": encodable(shorten(err.message, limit)),
        "type": error_type(err.status),
        "param": None if err.param is None else encodable(shorten(err.param, MAX_PARAM_CHARS)),
        "code": err.code,
    }
    for key, value in err.extra.items():
        fields[key] = _bounded(value, num_details)
    return {"error": fields}


def _bounded(value: object, num_details: int) -> object:
    if isinstance(value, str):
        return encodable(shorten(value, MAX_DETAIL_CHARS))
    if isinstance(value, list | tuple):
        return [encodable(shorten(str(item), MAX_DETAIL_CHARS)) for item in value[:num_details]]
    return value


def error_response(err: WireError) -> Response:
    return Response(error_body(err), err.status, headers=err.headers, media_type="application/json")
