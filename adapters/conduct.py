"""Conduct: how adapters are served: their profiles, and how aliases are split between versions.

Owns the acts, each durable and atomic, and what is in force. Does not know what a profile's fields mean: whoever sets
one has checked it. Knows no device and no request.
"""

from __future__ import annotations

import logging
from functools import partial

from adapters import ledger_conduct as ledger
from adapters.catalogue import AliasRecord
from adapters.errors import AdapterNotFound
from adapters.names import Names
from adapters.profile_layers import Fields, Layers, layers_of
from adapters.ref import AdapterRef
from adapters.traffic import Traffic

_log = logging.getLogger("lorikeet.adapters.conduct")


class Conduct:
    """Thread-safe."""

    def __init__(self, names: Names) -> None:
        self._names = names

    # ---- profiles ----------------------------------------------------------------------------------------------

    def profile(self, ref: AdapterRef) -> Layers:
        """Of one version; microseconds. Raises AdapterNotFound."""
        return layers_of(*self._names.find(str(ref)))

    def change_profile(self, name: str, version: int, changes: Fields) -> None:
        """Set fields of a version's profile, or with version 0 of the name's; None resets one to what is beneath.

        Raises AdapterNotFound, InsufficientStorage.
        """
        self._names.change(name, partial(ledger.change_profile, name=name, version=version, changes=changes))
        _log.info("profile.changed name=%s version=%d fields=%s", name, version, ",".join(sorted(changes)))

    def clear_profile(self, name: str, version: int) -> None:
        """Take back all that was set for a version, or with version 0 for the name."""
        self._names.change(name, partial(ledger.clear_profile, name=name, version=version))
        _log.info("profile.cleared name=%s version=%d", name, version)

    # ---- splits ------------------------------------------------------------------------------------------------

    def split(self, alias: str, traffic: Traffic) -> AliasRecord:
        """Split an alias between versions of the adapter that it is for. Raises AdapterNotFound."""
        record = self._alias(alias)
        act = partial(ledger.split, alias=alias, name=record.name, traffic=traffic)
        self._names.change(alias, act)
        _log.info("traffic.split alias=%s weights=%s", alias, dict(traffic.weights))
        return self._alias(alias)

    def end_split(self, alias: str) -> AliasRecord:
        """All of an alias's requests go to its target again, and no copies are made."""
        self._alias(alias)
        self._names.change(alias, partial(ledger.end_split, alias=alias))
        _log.info("traffic.whole alias=%s", alias)
        return self._alias(alias)

    def side(self, alias: str, key: str) -> tuple[AdapterRef, AdapterRef | None] | None:
        """The version of a split alias that a key goes to, and its shadow; None for what is not split."""
        record = self._names.alias(alias)
        if record is None or record.traffic is None:
            return None
        versions = {v.ref.version: v.ref for v in self._names.record(record.name).versions}
        number = record.traffic.side(alias, key, versions.keys())
        shadow = record.traffic.shadow
        primary = versions.get(record.version if number is None else number)
        if primary is None:
            return None
        return primary, versions.get(shadow.version) if shadow is not None else None

    def _alias(self, alias: str) -> AliasRecord:
        record = self._names.alias(alias)
        if record is None:
            raise AdapterNotFound(alias)
        return record
