"""Catalogue: the registry's index in memory: names, versions and near names, found in microseconds.

Owns lookups and nothing durable; the ledger is the truth and the registry keeps the two equal, under its own lock.
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from adapters.ref import AdapterRef
from adapters.traffic import Traffic
from adapters.validation import PackageReport

NUM_NEAR = 3
_MAX_CANDIDATES = 256
"""difflib takes about 20 us a name: a miss among 10,000 names must not cost the event loop 200 ms."""
_MIN_DIGEST_PREFIX = 8
"""Hex digits of a digest by which a version may be named: 32 bits do not collide among thousands."""


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version of one name; immutable, as the version is."""

    ref: AdapterRef
    report: PackageReport
    source: str
    created_s: float


@dataclass(frozen=True, slots=True)
class NameRecord:
    """One name: its versions, oldest first, and which of them it means."""

    name: str
    current: int
    """0 while no version has been promoted: then the bare name means nothing."""
    is_pinned: bool
    is_enabled: bool
    versions: tuple[VersionRecord, ...]
    history: tuple[int, ...] = ()
    """What was current before, the latest last; versions that are removed may still stand in it."""
    profiles: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    """Profiles that were set here, by version; 0 is the name's own."""

    def version(self, number: int) -> VersionRecord | None:
        return next((record for record in self.versions if record.ref.version == number), None)

    @property
    def head(self) -> VersionRecord | None:
        return self.version(self.current)

    @property
    def previous(self) -> VersionRecord | None:
        """What a rollback would make current."""
        found = (self.version(number) for number in reversed(self.history) if number != self.current)
        return next((record for record in found if record is not None), None)

    def select(self, selector: str) -> VersionRecord | None:
        """The version that ``3`` or ``sha256:<at least 8 hex digits>`` names."""
        if selector.isascii() and selector.isdigit() and len(selector) < 10:
            return self.version(int(selector))
        prefix = selector.removeprefix("sha256:")
        if prefix == selector or len(prefix) < _MIN_DIGEST_PREFIX:
            return None
        matches = [record for record in self.versions if record.ref.digest.startswith(prefix)]
        return matches[0] if len(matches) == 1 else None


@dataclass(frozen=True, slots=True)
class AliasRecord:
    """A further name, and the one version of one adapter that it means."""

    alias: str
    name: str
    version: int
    history: tuple[tuple[str, int], ...] = ()
    """What it meant before, the latest last."""
    traffic: Traffic | None = None
    """How its requests are split between versions of that adapter; None where all go to the one."""


class Catalogue:
    """Not thread-safe."""

    def __init__(self, records: Iterable[NameRecord] = (), aliases: Iterable[AliasRecord] = ()) -> None:
        self._records = {record.name: record for record in records}
        self._aliases = {alias.alias: alias for alias in aliases}
        known = (*self._records, *self._aliases)
        self._forwards = sorted(known)
        self._backwards = sorted(name[::-1] for name in known)
        self._digests = Counter(version.ref.digest for record in self for version in record.versions)

    def __iter__(self) -> Iterator[NameRecord]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def get(self, name: str) -> NameRecord | None:
        return self._records.get(name)

    def find(self, ref: AdapterRef) -> VersionRecord | None:
        record = self._records.get(ref.name)
        version = record.version(ref.version) if record else None
        return version if version and version.ref == ref else None

    def alias(self, alias: str) -> AliasRecord | None:
        return self._aliases.get(alias)

    def aliases(self) -> list[AliasRecord]:
        return list(self._aliases.values())

    def put(self, record: NameRecord) -> None:
        self.drop(record.name)
        self._records[record.name] = record
        self._spell(record.name)
        self._digests.update(version.ref.digest for version in record.versions)

    def put_alias(self, record: AliasRecord) -> None:
        self.drop(record.alias)
        self._aliases[record.alias] = record
        self._spell(record.alias)

    def _spell(self, name: str) -> None:
        bisect.insort(self._forwards, name)
        bisect.insort(self._backwards, name[::-1])

    def drop(self, name: str) -> None:
        """Forget a name or an alias, if there is one."""
        record, alias = self._records.pop(name, None), self._aliases.pop(name, None)
        if record is None and alias is None:
            return
        self._forwards.pop(bisect.bisect_left(self._forwards, name))
        self._backwards.pop(bisect.bisect_left(self._backwards, name[::-1]))
        for version in () if record is None else record.versions:
            self._digests[version.ref.digest] -= 1
            if not self._digests[version.ref.digest]:
                del self._digests[version.ref.digest]

    def has_digest(self, digest: str) -> bool:
        return digest in self._digests

    def near(self, name: str, is_visible: Callable[[str], bool]) -> tuple[str, ...]:
        """Up to three names that ``name`` may have meant, of those that the asker may see."""
        by_fold = {found.casefold(): found for found in self._neighbours(name) if is_visible(found)}
        matches = difflib.get_close_matches(name[:200].casefold(), by_fold, n=NUM_NEAR)
        return tuple(by_fold[match] for match in matches)

    def _neighbours(self, name: str) -> list[str]:
        """All names when they are few; else those beside it in order, read forwards and read backwards."""
        if len(self._forwards) <= _MAX_CANDIDATES:
            return self._forwards
        forwards = _around(self._forwards, name)
        backwards = [found[::-1] for found in _around(self._backwards, name[::-1])]
        return [*forwards, *backwards]


def _around(ordered: list[str], name: str) -> list[str]:
    middle = bisect.bisect_left(ordered, name)
    return ordered[max(0, middle - _MAX_CANDIDATES // 4) : middle + _MAX_CANDIDATES // 4]
