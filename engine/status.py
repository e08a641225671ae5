"""EngineStatus: a frozen picture of the engine that any thread may hold. The engine makes it; nobody else does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from adapters.ref import AdapterRef


@dataclass(frozen=True, slots=True)
class SlotStatus:
    slot: int
    ref: AdapterRef | None
    state: Literal["free", "loading", "resident"]
    is_pinned: bool
    num_requests: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """``running`` and ``waiting`` count sequences by adapter name ("base" for the base)."""

    is_ready: bool
    is_alive: bool
    is_draining: bool
    running: Mapping[str, int]
    waiting: Mapping[str, int]
    waiting_for_adapter: int
    kv_blocks_used: int
    kv_blocks_total: int
    slots: tuple[SlotStatus, ...]
    host_bytes: int
    host_refs: frozenset[AdapterRef]
    slot_bank_bytes: int
    steps: int
    heartbeat_age_s: float
    num_recoveries: int = 0
