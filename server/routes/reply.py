"""Small pieces that the admin routes share: JSON out, the actor, and strict fields in."""

from __future__ import annotations

import re
from collections.abc import Mapping

import orjson
from starlette.requests import Request
from starlette.responses import Response

from server.actors import Actor
from server.auth import caller_of
from server.errors import WireError, invalid_request, shorten, unsupported

_VERSION = re.compile(r"[1-9][0-9]{0,8}|sha256:[0-9a-f]{8,64}")


def json_reply(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def actor_of(request: Request) -> Actor:
    return Actor(caller_of(request), str(request.state.request_id))


class Fields:
    """The fields of a small JSON object: each is asked for once, and what nobody asked for is a 400."""

    def __init__(self, body: Mapping[str, object]) -> None:
        self._body = dict(body)

    def text(self, name: str, max_chars: int = 4096) -> str:
        value = self.optional_text(name, max_chars)
        if value is None:
            raise invalid_request(f"`{name}` is missing", name)
        return value

    def optional_text(self, name: str, max_chars: int = 4096) -> str | None:
        value = self._body.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, str) or not value or len(value) > max_chars:
            raise invalid_request(f"`{name}` must be a text of 1 to {max_chars} characters", name)
        return value

    def optional_object(self, name: str) -> dict[str, object] | None:
        value = self._body.pop(name, None)
        if value is not None and not isinstance(value, dict):
            raise invalid_request(f"`{name}` must be a JSON object", name)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._body.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid_request(f"`{name}` must be true or false", name)
        return value

    def version(self, name: str) -> str | None:
        """A version as a selector: its number, as a number or a text, or ``sha256:<hex>``."""
        value = self._body.pop(name, None)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9:
            return str(value)
        if isinstance(value, str) and _VERSION.fullmatch(value):
            return value
        raise invalid_request(f"`{name}` must be a version's number, or sha256:<8 to 64 hex digits>", name)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing here, whatever they hold."""
        for name in names:
            self._body.pop(name, None)

    def refuse(self, name: str, why: str) -> None:
        """A known field that is not supported: null only."""
        if self._body.pop(name, None) is not None:
            raise unsupported(why, name)

    def end(self) -> None:
        for name in self._body:
            short = shorten(name, 64)
            raise WireError(400, "invalid_request", f"unknown field `{short}`", param=short)
