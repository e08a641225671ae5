"""Layers: what one version is served with where a request says nothing, and where each of it comes from. Values only.

Does not know what the fields mean; ``server/profiles.py`` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from adapters.catalogue import NameRecord, VersionRecord

ALL_VERSIONS = 0
"""In place of a version's number: the name's own profile, which holds for each of its versions."""

Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Layers:
    """A later layer wins."""

    package: Fields = field(default_factory=dict)
    """Came with the weights."""
    adapter: Fields = field(default_factory=dict)
    """Set for the name: holds for each of its versions."""
    version: Fields = field(default_factory=dict)
    """Set for this version alone."""

    @property
    def values(self) -> dict[str, object]:
        return {**self.package, **self.adapter, **self.version}

    @property
    def origins(self) -> dict[str, str]:
        layers = (("package", self.package), ("adapter", self.adapter), ("version", self.version))
        return {key: origin for origin, fields in layers for key in fields}


NO_LAYERS = Layers()


def layers_of(record: NameRecord, version: VersionRecord) -> Layers:
    profiles = record.profiles
    return Layers(
        package=_fields(version.report.defaults),
        adapter=profiles.get(ALL_VERSIONS, {}),
        version=profiles.get(version.ref.version, {}),
    )


@lru_cache(maxsize=4096)
def _fields(text: str) -> Fields:
    fields: Fields = json.loads(text)
    return fields
