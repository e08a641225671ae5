"""EngineStatus: a frozen picture of the engine that any thread may hold. The engine's thread publishes it at the end of
each step; nobody else writes.
"""

from __future__ import annotations

import time
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


@dataclass(frozen=True, slots=True)
class Sizes:
    """What adapters take in the tiers; changes only when one moves."""

    host_bytes: int
    host_refs: frozenset[AdapterRef]
    slot_bank_bytes: int


@dataclass(frozen=True, slots=True)
class SwapsPicture:
    """The adapters' part of a picture."""

    slots: tuple[SlotStatus, ...]
    host_bytes: int
    host_refs: frozenset[AdapterRef]
    slot_bank_bytes: int


@dataclass(frozen=True, slots=True)
class Picture:
    """What the engine's thread publishes; the board adds who reads it when."""

    running: Mapping[str, int]
    waiting: Mapping[str, int]
    waiting_for_adapter: int
    kv_blocks_used: int
    swaps: SwapsPicture
    num_steps: int
    num_recoveries: int


class StatusBoard:
    """One writer, any readers: assignment of one reference is all that is shared."""

    def __init__(self, kv_blocks_total: int, first: Picture) -> None:
        self._kv_blocks_total = kv_blocks_total
        self._picture = first
        self._heartbeat_s = time.monotonic()

    def beat(self) -> None:
        """The engine's loop is turning."""
        self._heartbeat_s = time.monotonic()

    def publish(self, picture: Picture) -> None:
        self._picture = picture
        self.beat()

    def read(self, is_alive: bool, is_draining: bool) -> EngineStatus:
        picture = self._picture
        return EngineStatus(
            is_ready=is_alive and not is_draining,
            is_alive=is_alive,
            is_draining=is_draining,
            running=picture.running,
            waiting=picture.waiting,
            waiting_for_adapter=picture.waiting_for_adapter,
            kv_blocks_used=picture.kv_blocks_used,
            kv_blocks_total=self._kv_blocks_total,
            slots=picture.swaps.slots,
            host_bytes=picture.swaps.host_bytes,
            host_refs=picture.swaps.host_refs,
            slot_bank_bytes=picture.swaps.slot_bank_bytes,
            steps=picture.num_steps,
            heartbeat_age_s=time.monotonic() - self._heartbeat_s,
            num_recoveries=picture.num_recoveries,
        )
