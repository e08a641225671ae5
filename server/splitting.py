"""Draw: what names mean to one request. A split alias means one of its versions, the same throughout the request.

Owns where a request's key is found. The side of a key is the registry's; a request without a key gets a random one.
Place in a request's way: step 2, between the chooser and the registry.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.ref import AdapterRef
from adapters.traffic import Shadow
from server.schemas import GenerationFields

if TYPE_CHECKING:
    from adapters.entry import AdapterEntry
    from adapters.registry import Registry

HEADER_PREFIX = "header:"
METADATA_PREFIX = "metadata:"


@dataclass(frozen=True, slots=True)
class Side:
    """What a split alias came to."""

    primary: AdapterRef
    shadow: AdapterRef | None = None
    terms: Shadow | None = None


class Draw:
    """Belongs to one request. Stands in for the registry where names are resolved."""

    def __init__(self, registry: Registry, request: GenerationFields, headers: Mapping[str, str]) -> None:
        self._registry = registry
        self._request = request
        self._headers = headers
        self._sides: dict[str, Side] = {}

    def resolve(self, name: str, *, is_visible: Callable[[str], bool]) -> AdapterRef:
        """As Registry.resolve."""
        if name not in self._sides:
            side = self._side(name)
            if side is None:
                return self._registry.resolve(name, is_visible=is_visible)
            self._sides[name] = side
        return self._sides[name].primary

    def entry(self, name: str) -> AdapterEntry:
        return self._registry.entry(name)

    def entries(self) -> Sequence[AdapterEntry]:
        return self._registry.entries()

    def shadow_of(self, ref: AdapterRef) -> tuple[str, Side] | None:
        """The alias through which ``ref`` was drawn, if its answers are to be compared."""
        for alias, side in self._sides.items():
            if side.primary == ref and side.shadow is not None:
                return alias, side
        return None

    def _side(self, alias: str) -> Side | None:
        record = self._registry.pointers.alias(alias)
        if record is None or record.traffic is None:
            return None
        key = key_of(record.traffic.sticky, self._request, self._headers) or secrets.token_hex(16)
        found = self._registry.conduct.side(alias, key)
        if found is None:
            return None
        primary, shadow = found
        return Side(primary, shadow if shadow != primary else None, record.traffic.shadow)


def key_of(sticky: str, request: GenerationFields, headers: Mapping[str, str]) -> str | None:
    """A request's key, where its alias looks for it; None where there is none, or it is empty."""
    if sticky.startswith(HEADER_PREFIX):
        return headers.get(sticky.removeprefix(HEADER_PREFIX)) or None
    if sticky.startswith(METADATA_PREFIX):
        value = (request.metadata or {}).get(sticky.removeprefix(METADATA_PREFIX))
        is_plain = isinstance(value, str | int) and not isinstance(value, bool)
        return str(value) or None if is_plain else None
    return request.user or request.safety_identifier or None
