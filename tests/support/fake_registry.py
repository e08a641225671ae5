"""A registry without packages, and a loader without pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from adapters.catalogue import AliasRecord
from adapters.errors import AdapterNotFound
from adapters.manifest import Kind
from adapters.profile_layers import Layers
from adapters.ref import BASE, AdapterRef
from adapters.sites import Part
from base.prompt import ImagePart


def ref(name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(name, version, hashlib.sha256(f"{name}@{version}".encode()).hexdigest())


class FakeLease:
    def __init__(self, registry: FakeRegistry, ref: AdapterRef) -> None:
        self.ref = ref
        self._registry = registry
        self._is_released = False

    def release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._registry.leases.remove(self.ref)


@dataclass(frozen=True, slots=True)
class FakeReport:
    """A package, as far as composing goes."""

    kind: Kind = "lora"
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj",)
    parts: tuple[Part, ...] = ("language",)


@dataclass(frozen=True, slots=True)
class FakeEntry:
    ref: AdapterRef
    report: FakeReport = FakeReport()


class FakePointers:
    """No alias at all."""

    def alias(self, alias: str) -> None:
        return None

    def aliases(self) -> list[AliasRecord]:
        return []

    def pinned(self) -> list[AdapterRef]:
        return []


class FakeConduct:
    """No alias is split; profiles are what a test puts in ``layers``, by name."""

    def __init__(self) -> None:
        self.layers: dict[str, Layers] = {}

    def profile(self, ref: AdapterRef) -> Layers:
        return self.layers.get(ref.name, Layers())

    def side(self, alias: str, key: str) -> None:
        return None


class FakeRegistry:
    """Names to refs, with leases counted; holds no packages."""

    def __init__(self, *names: str) -> None:
        self.pointers = FakePointers()
        self.conduct = FakeConduct()
        self.versions: dict[str, list[AdapterRef]] = {name: [ref(name)] for name in names}
        self.leases: list[AdapterRef] = []
        self.reports: dict[str, FakeReport] = {}
        """By name; others are ``FakeReport()``."""

    def resolve(self, name: str, *, is_visible: Callable[[str], bool] = lambda name: True) -> AdapterRef:
        if name == "base":
            return BASE
        stem, _, version = name.partition("@")
        for found in reversed(self.versions.get(stem, [])):
            if not version or str(found.version) == version:
                return found
        near = tuple(other for other in self.versions if other[:3] == stem[:3] and is_visible(other))
        raise AdapterNotFound(name, near)

    def entry(self, name: str) -> FakeEntry:
        ref = self.resolve(name)
        return FakeEntry(ref, self.reports.get(ref.name, FakeReport()))

    def refresh(self) -> None:
        """There are no other servers."""

    def has(self, ref: AdapterRef) -> bool:
        return ref in self.versions.get(ref.name, [])

    def entries(self) -> list[FakeEntry]:
        return [FakeEntry(versions[-1]) for versions in self.versions.values()]

    def lease(self, ref: AdapterRef) -> FakeLease:
        if ref != BASE:
            self.resolve(str(ref))
        self.leases.append(ref)
        return FakeLease(self, ref)


class FakeMedia:
    """Loads nothing: every URL is a small red picture, unless ``failure`` is set."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.loads: list[tuple[str, str]] = []

    def budget(self) -> None:
        return None

    async def load(
        self,
        url: str,
        detail: str = "auto",
        budget: object = None,
        usual: tuple[int | None, int | None] = (None, None),
    ) -> ImagePart:
        self.loads.append((url, detail))
        self.usual = usual
        if self.failure is not None:
            raise self.failure
        return ImagePart(Image.new("RGB", (28, 28), "red"))
