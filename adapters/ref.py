"""AdapterRef: the frozen identity of one version of one adapter, as everything below the wire carries it.

The registry makes refs; nobody else does. A ref never changes meaning: its digest names the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable version of an adapter. The base counts as one: see ``BASE``."""

    name: str
    version: int
    digest: str
    """Hex SHA-256 of the package's content; empty for the base."""
    vision_digest: str = ""
    """Digest of its vision-tower and merger weights alone; empty when it has none (or is the base): adapters that
    share it share image embeddings."""
    language_digest: str = ""
    """Digest of its language weights alone; empty when it has none: such adapters share KV with the base for text."""

    @property
    def is_base(self) -> bool:
        return self.version == 0

    def __str__(self) -> str:
        return "base" if self.is_base else f"{self.name}@{self.version}"


BASE = AdapterRef(name="base", version=0, digest="")
