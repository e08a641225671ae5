"""Moves: what the residency decides, the mover carries out, and tells of. Frozen values.

Place in a request's way: step 5, between who decides and who acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from adapters.errors import AdapterError
from adapters.profile import Proof
from adapters.ref import AdapterRef


class Tier(StrEnum):
    """Where an adapter's weights are, slowest first."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Load:
    ref: AdapterRef
    slot: int


@dataclass(frozen=True, slots=True)
class Evict:
    ref: AdapterRef
    slot: int


Move = Load | Evict


@dataclass(frozen=True, slots=True)
class Moved:
    """The weights are in the slot."""

    move: Load
    num_bytes: int
    seconds: Mapping[str, float]
    """By stage: ``read`` (from disk, checked; 0 if the host tier had it longer) and ``copy`` (into the slot)."""
    origin: Tier = Tier.DISK
    proof: Proof | None = None
    """What its package lets a server check; None where it says nothing."""


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """The slot is empty."""

    move: Load
    error: AdapterError
