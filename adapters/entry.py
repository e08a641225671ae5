"""AdapterEntry: all that is known of one version of one adapter, as listings show it. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.catalogue import NameRecord, VersionRecord
from adapters.leases import LeaseBook
from adapters.profile_layers import NO_LAYERS, Layers, layers_of
from adapters.ref import AdapterRef
from adapters.validation import PackageReport


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One version of one adapter, as listings show it."""

    ref: AdapterRef
    report: PackageReport
    source: str
    created_s: float
    """Unix time of this version's registration."""
    is_pinned: bool
    is_enabled: bool
    """False after an explicit unload, until somebody loads it again."""
    num_leases: int
    last_used_s: float | None
    """Unix time of the last lease in this process; None when there was none."""
    is_current: bool
    """Whether the bare name means this version."""
    versions: tuple[int, ...]
    """Numbers of all versions that the name has, oldest first."""
    layers: Layers = NO_LAYERS
    """What it is served with where a request says nothing."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A package that was taken in and checked, and that no bare name means because of it."""

    entry: AdapterEntry
    is_new: bool
    """False if the name had this version already."""


def entry_of(record: NameRecord, version: VersionRecord, leases: LeaseBook) -> AdapterEntry:
    num_leases, last_used_s = leases.usage(version.ref)
    return AdapterEntry(
        ref=version.ref,
        report=version.report,
        source=version.source,
        created_s=version.created_s,
        is_pinned=record.is_pinned,
        is_enabled=record.is_enabled,
        num_leases=num_leases,
        last_used_s=last_used_s,
        is_current=version.ref.version == record.current,
        versions=tuple(version.ref.version for version in record.versions),
        layers=layers_of(record, version),
    )
