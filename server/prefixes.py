"""What an operator may write for ``object_prefixes``: the schemes that exist, and addresses in plain parts."""

from __future__ import annotations

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
