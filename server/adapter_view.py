"""How an adapter looks on the wire: one flat record, made from the registry's entry and the engine's status."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from adapters.ref import AdapterRef
from engine.status import EngineStatus

if TYPE_CHECKING:
    from adapters.catalogue import AliasRecord
    from adapters.entry import AdapterEntry

Record = dict[str, object]


class AdapterViewer:
    """Joins entries with one status: cheap for 10,000 of them."""

    def __init__(self, status: EngineStatus, aliases: Iterable[AliasRecord] = ()) -> None:
        self._slots = {slot.ref: slot for slot in status.slots if slot.ref is not None}
        self._host = status.host_refs
        self._aliases: dict[tuple[str, int], list[str]] = {}
        for alias in aliases:
            self._aliases.setdefault((alias.name, alias.version), []).append(alias.alias)

    def record(self, entry: AdapterEntry) -> Record:
        ref, report = entry.ref, entry.report
        tier, state = self._place(ref)
        return {
            "name": ref.name,
            "version": ref.version,
            "digest": ref.digest,
            "state": state,
            "tier": tier,
            "rank": report.rank,
            "targets": list(report.targets),
            "kind": str(report.kind),
            "bytes": report.num_bytes,
            "refs": entry.num_leases,
            "last_used": time_text(entry.last_used_s),
            "created": time_text(entry.created_s),
            "source": entry.source,
            "profile": entry.layers.values or None,
            "profile_from": entry.layers.origins,
            "pinned": entry.is_pinned,
            "current": entry.is_current,
            "versions": list(entry.versions),
            "aliases": self._aliases.get((ref.name, ref.version), []),
        }

    def _place(self, ref: AdapterRef) -> tuple[str, str]:
        """(tier, state): the fastest tier that holds it; ``loading`` while it is on its way to the device."""
        slot = self._slots.get(ref)
        if slot is not None and slot.state == "resident":
            return "device", "loaded"
        tier = "host" if ref in self._host else "disk"
        return tier, "loading" if slot is not None else "unloaded"


def time_text(unix_s: float | None) -> str | None:
    """RFC 3339, UTC, milliseconds."""
    if unix_s is None:
        return None
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
