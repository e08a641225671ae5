"""EngineStatus: a frozen picture of the engine that any thread may hold. The engine's thread publishes it at the end of
each step; nobody else writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from adapters.ref import AdapterRef

HUNG_AFTER_S = 60.0
"""No step takes so long unless something is wrong: a device that hangs, or memory that swaps."""


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
    """Faults after which the engine went on: its loop was reset, or its process started anew."""
    num_restarts: int = 0
    """Of them, the processes."""
    is_restarting: bool = False
    """It died or hung, and a new one is being started."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """Whose kernels compute what, by kind; empty where there is no choice."""


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


def idle_picture(num_slots: int) -> Picture:
    """Of an engine that holds nothing, or that is gone."""
    slots = tuple(SlotStatus(i, None, "free", False, 0, 0) for i in range(num_slots))
    return Picture({}, {}, 0, 0, SwapsPicture(slots, 0, frozenset(), 0), 0, 0)


class StatusBoard:
    """One writer, any readers: assignment of one reference is all that is shared."""

    def __init__(
        self, kv_blocks_total: int, first: Picture, kernels: Mapping[str, str] | None = None
    ) -> None:
        self._kv_blocks_total = kv_blocks_total
        self._kernels = dict(kernels or {})
        self._picture = first
        self._heartbeat_s = time.monotonic()
        self.on_publish: Callable[[Picture], None] | None = None
        """Called on the engine's thread with each picture: for a reader in another process."""

    @property
    def picture(self) -> Picture:
        return self._picture

    @property
    def heartbeat_age_s(self) -> float:
        return time.monotonic() - self._heartbeat_s

    def beat(self, age_s: float = 0.0) -> None:
        """The engine's loop was turning so long ago."""
        self._heartbeat_s = time.monotonic() - age_s

    def publish(self, picture: Picture) -> None:
        self._picture = picture
        self.beat()
        if self.on_publish is not None:
            self.on_publish(picture)

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
            heartbeat_age_s=self.heartbeat_age_s,
            num_recoveries=picture.num_recoveries,
            kernels=self._kernels,
        )
