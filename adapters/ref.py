"""AdapterRef: the frozen identity of one version of one adapter, as everything below the wire carries it.

The registry makes refs of what is registered, ``composition`` those of several together; nobody else does. A ref never
changes meaning: its digest names the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

COMPOSED = "(composed)"
"""The name of every composition, where one is needed: no adapter can have it, and a client cannot add to it."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable version of an adapter, or several composed. The base counts as one: see ``BASE``."""

    name: str
    version: int
    digest: str
    """Hex SHA-256 of the package's content; empty for the base."""
    vision_digest: str = ""
    """Digest of its vision-tower and merger weights alone; empty when it has none (or is the base): adapters that
    share it share image embeddings."""
    language_digest: str = ""
    """Digest of its language weights alone; empty when it has none: such adapters share KV with the base for text."""
    parts: tuple[WeightedRef, ...] = ()
    """What a composition adds up; empty for all others."""

    @property
    def is_base(self) -> bool:
        return self.version == 0

    @property
    def is_composed(self) -> bool:
        return bool(self.parts)

    @property
    def title(self) -> str:
        """What its users call it: an adapter's name without the version, a composition's parts."""
        return str(self) if self.is_composed else self.name

    @property
    def versions(self) -> tuple[AdapterRef, ...]:
        """The registered versions whose bytes it needs: its parts, itself, or, for the base, none."""
        if self.is_composed:
            return tuple(part.ref for part in self.parts)
        return () if self.is_base else (self,)

    def __str__(self) -> str:
        if self.is_composed:
            return "+".join(map(str, self.parts))
        return "base" if self.is_base else f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class WeightedRef:
    """One part of a composition."""

    ref: AdapterRef
    weight: float
    """Finite, and not 0."""

    def __str__(self) -> str:
        return f"{self.ref}*{repr(self.weight).removesuffix('.0')}"


BASE = AdapterRef(name="base", version=0, digest="")
