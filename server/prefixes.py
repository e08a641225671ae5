"""What an operator may write of object stores: prefixes in plain parts, and drivers' options by scheme."""

from __future__ import annotations

import json
from collections.abc import Mapping

from adapters.errors import SourceRejected
from adapters.sources.object_store import DRIVERS, ObjectAddress


def require_prefixes(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """In one form. Raises ValueError for one that could never allow anything."""
    return tuple(str(_prefix(text)) for text in prefixes)


def _prefix(text: str) -> ObjectAddress:
    schemes = ", ".join(f"{scheme}://" for scheme in DRIVERS)
    if text.partition("://")[0].lower() not in DRIVERS or "://" not in text:
        raise ValueError(f"a prefix is a URL of {schemes}, such as s3://bucket/adapters")
    try:
        return ObjectAddress.parse(text)
    except SourceRejected as error:
        raise ValueError(
            f"a prefix is a plain URL of {schemes}, without user, query, wildcards or '..'"
        ) from error


Options = dict[str, dict[str, str | int | bool]]


def read_options(value: object) -> object:
    """JSON from a flag or the environment; a table from a file."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError('options are JSON by scheme, such as {"az": {"account_name": "models"}}') from error


def require_options(options: Options) -> Options:
    """Raises ValueError for a scheme that no driver reads."""
    unknown = sorted(options.keys() - DRIVERS.keys())
    if unknown:
        raise ValueError(f"options are by scheme ({', '.join(DRIVERS)}), not {unknown[0][:32]!a}")
    return options


def show_options(options: Mapping[str, Mapping[str, object]]) -> str:
    """Which are given; never their values, which may be secrets."""
    return ", ".join(f"{scheme}: {' '.join(given)}" for scheme, given in options.items()) or "none"
