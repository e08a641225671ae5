"""What happens around every route, as plain ASGI (BaseHTTPMiddleware would break streaming and disconnects).

From the outside in: ``Recorder`` (id, headers, log line, counter), ``Boundary`` (what escapes becomes the envelope),
``Doorman`` (host, key, drain, content type: decided from the head alone), ``BodyLimit``, ``HeadAsGet``.

Owns none of the decisions about content. Place in a request's way: step 1, and the last byte's way out.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import WireError, error_response, retry_after, to_wire
from server.settings import is_loopback_host
from server.strictjson import require_json
from server.uploads import is_raw_body

if TYPE_CHECKING:
    from server.state import ServerState

access_log = logging.getLogger("lorikeet.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
ALWAYS_OPEN = frozenset({"/health", "/ready", "/metrics", "/version"})
"""Answered while draining too."""
QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Polled every few seconds: logged at debug."""
BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


def _route_of(scope: Scope) -> str | None:
    """The matched route's template; None before routing and where nothing matched."""
    return getattr(scope.get("route"), "path", None)


class Recorder:
    """Outermost: gives the request its id, and when the last byte has left writes one line and one count."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        begin_s = time.monotonic()
        status = 499  # the client left before an answer

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        self._state.drain.enter()
        try:
            await self._app(scope, receive, send_recorded)
        finally:
            self._state.drain.leave()
            self._record(scope, status, time.monotonic() - begin_s)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = _route_of(scope)
        self._state.metrics.count_http(route, scope["method"], status)
        caller = scope["state"].get("caller")
        access_log.log(
            logging.DEBUG if route in QUIET else logging.INFO,
            "http.answered request_id=%s method=%s route=%s status=%d took_ms=%.1f caller=%s",
            scope["state"]["request_id"],
            scope["method"] if len(scope["method"]) <= 8 else "OTHER",
            route or "unmatched",
            status,
            1000 * seconds,
            caller.name if caller is not None else "-",
        )


def _request_id(asked: str | None) -> str:
    return asked if asked is not None and _SANE_ID.fullmatch(asked) else f"req-{secrets.token_hex(12)}"


class Boundary:
    """Turns whatever escapes a route into the envelope. After the first byte the connection just ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def send_noted(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:  # noqa: BLE001 (step 12: every failure is answered)
            wire = to_wire(error)
            if not has_started:
                await error_response(wire)(scope, receive, send)


class Doorman:
    """Who may pass, from the request's head alone: a refused request's body is never read."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._hosts = frozenset(host.lower() for host in state.settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            method, path = scope["method"], scope["path"]
            self._check_host(headers.get("host", ""))
            _check_path(path)
            scope["state"]["caller"] = self._state.gate.admit(method, path, headers.get("authorization"))
            self._check_drain(path)
            if method in BODY_METHODS and not is_raw_body(
                method, path
            ):  # the upload's route asks for its own type
                _check_content_type(headers)
        await self._app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        """On a loopback address only loopback names are served: a web page cannot rebind its name to this server."""
        name = _host_name(host)
        if self._state.settings.is_loopback and not is_loopback_host(name) and name not in self._hosts:
            raise WireError(
                400, "invalid_request", "the Host header names another server: see the setting allowed_hosts"
            )

    def _check_drain(self, path: str) -> None:
        if self._state.drain.is_draining and path not in ALWAYS_OPEN:
            raise WireError(
                503, "draining", "the server is stopping: send the request to another", headers=retry_after(1)
            )


def _check_path(path: str) -> None:
    """The router takes ``/metrics%0A`` for ``/metrics``; what the gate and the router read must be the same."""
    if path.endswith("\n"):
        raise WireError(404, "not_found", "this server has no such path: see /docs")


def _host_name(host: str) -> str:
    """The Host header without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).strip("[]").lower()


def _check_content_type(headers: Headers) -> None:
    """A body must be JSON; a POST without body and type is fine where the route needs none, but for foreign pages.

    A page of another site may POST nothing without asking first, and some acts need nothing; JSON it has to ask for.
    """
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if has_body or "content-type" in headers or _is_of_another_site(headers):
        require_json(headers.get("content-type"))


def _is_of_another_site(headers: Headers) -> bool:
    """Whether a browser says that a page of another origin sends this. Programs say nothing of the kind."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


class BodyLimit:
    """413 before parsing, also for bodies that do not say their length.

    FastAPI's own ``max_body_size`` answers in plain text, and errors here have one envelope.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_raw_bytes: int) -> None:
        """``max_raw_bytes`` is for the files of a package, which are not requests to be parsed."""
        self._app = app
        self._max_bytes = max_bytes
        self._max_raw_bytes = max_raw_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_raw = is_raw_body(scope["method"], scope["path"])
        limit = self._max_raw_bytes if is_raw else self._max_bytes
        length = Headers(scope=scope).get("content-length")
        if length is not None and length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, receive_counted, send)


def _too_large(limit: int) -> WireError:
    return WireError(413, "body_too_large", f"the body is over {limit:,} bytes, this server's limit")


class HeadAsGet:
    """HEAD is answered by the GET route, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        inner: Scope = {**scope, "method": "GET"}

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(inner, receive, send_head)
        finally:
            if "route" in inner:
                scope["route"] = inner["route"]
