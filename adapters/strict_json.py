"""Strict JSON for files that strangers wrote: size, depth, duplicate keys and NaN are checked, never tolerated.

Owns one function. Does not know what the document means; the caller turns ValueError into its own refusal.
"""

from __future__ import annotations

import json
import re
from typing import Never

MAX_DEPTH = 64
"""Real adapter configurations nest three deep; deeper than this is an attack on the parser's stack."""

_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
"""Strings, so that brackets inside them are passed over, and brackets."""


def parse_object(data: bytes) -> dict[str, object]:
    """The JSON object in ``data`` (UTF-8). Raises ValueError that says what is wrong, never echoing the document."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    _check_depth(text)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if isinstance(value, dict):
        return value
    raise ValueError("its top level is not a JSON object")


def _check_depth(text: str) -> None:
    depth = 0
    for token in _BRACKETS.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
        elif token[0] in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"it has the key {key[:96]!a} twice")
        result[key] = value
    return result


def _no_constant(name: str) -> Never:
    raise ValueError(f"it holds {name}, which is not JSON")
