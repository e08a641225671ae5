"""Strict JSON: a request's body to a dictionary, or a 400 that says what is wrong with it.

Stricter than the standard library: duplicate keys, NaN and infinities (also by overflow, 1e999), unpaired surrogates
and nesting over 64 are refused. Knows no field of any request. Place in a request's way: step 1, first in a route.
"""

from __future__ import annotations

import json
import math
from typing import NoReturn

from starlette.requests import Request

from server.errors import WireError, invalid_request, shorten

MAX_DEPTH = 64
MAX_KEYS = 16_384
"""Of one object: the largest JSON schema has fewer. Each unknown key of a million costs 20 us of everybody's time."""

Json = dict[str, object]


async def read_object(request: Request) -> Json:
    """The request's JSON object. Raises WireError: 415 unsupported_media_type, 400 invalid_json or invalid_request."""
    require_json(request.headers.get("content-type"))
    return parse_object(await request.body())


def require_json(content_type: str | None) -> None:
    """Only ``application/json`` in UTF-8: browsers send other types across sites without asking first."""
    kind, _, parameters = (content_type or "").partition(";")
    if kind.strip().lower() != "application/json":
        got = f"got {shorten(kind.strip(), 64)}" if kind.strip() else "there was no content-type header"
        raise WireError(415, "unsupported_media_type", f"send the body as application/json; {got}")
    name, _, value = parameters.strip().lower().partition("=")
    if name == "charset" and value.strip('" ') not in ("utf-8", "utf8"):
        raise WireError(415, "unsupported_media_type", "send the body in UTF-8, the only encoding of JSON")


def parse_object(data: bytes) -> Json:
    value = parse(data)
    if not isinstance(value, dict):
        raise invalid_request("the body must be a JSON object")
    return value


def parse(data: bytes) -> object:
    """Any JSON value. Raises WireError 400 invalid_json."""
    if not data.strip():
        raise _refuse("the body is empty; send a JSON object")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refuse(f"the body is not UTF-8 (byte {error.start})") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _refuse(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # an integer of thousands of digits, which Python will not convert
        raise _refuse("a number has too many digits") from None
    _check_nesting(value)
    if b"\\u" in data:
        _check_text(value)
    return value


def _refuse(message: str) -> WireError:
    return WireError(400, "invalid_json", f"the body is not valid JSON: {message}")


def _too_deep() -> WireError:
    return _refuse(f"it nests deeper than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, object]]) -> Json:
    if len(pairs) > MAX_KEYS:
        raise _refuse(f"an object has over {MAX_KEYS:,} keys")
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _refuse(f"the key {shorten(key, 64)!r} appears twice in one object")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _refuse(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _refuse("a number is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, strict=True
)


def _check_nesting(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _containers(parent)]
        if not level:
            return
    raise _too_deep()


def _containers(value: object) -> list[object]:
    if isinstance(value, dict):
        return [child for child in value.values() if isinstance(child, dict | list)]
    if isinstance(value, list):
        return [child for child in value if isinstance(child, dict | list)]
    return []


def _check_text(value: object) -> None:
    """Half of a surrogate pair can be escaped in JSON, but is no character and cannot be answered in UTF-8."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and not _is_encodable(item):
            raise _refuse("a string holds half of a surrogate pair")


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
