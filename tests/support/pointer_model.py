"""What a registry should mean after any acts: dictionaries, in which nothing can go wrong; no files."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterError
from adapters.registry import Registry

Act = tuple[str, str, int]
"""(what, name or alias, package or version)."""
ALIAS_OF = {"prod": "a", "ft:x": "org/a"}
"""The aliases that acts move, and the adapter that each is pointed at."""
NAMES = ("a", "b", "org/a")


@dataclass(slots=True)
class Name:
    numbers: dict[str, int] = field(default_factory=dict)
    """Digest to version, for ever."""
    live: list[int] = field(default_factory=list)
    current: int = 0
    history: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Model:
    """``apply`` does an act; one that cannot be done changes nothing."""

    digests: Sequence[str]
    names: dict[str, Name] = field(default_factory=dict)
    aliases: dict[str, tuple[str, int]] = field(default_factory=dict)
    histories: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def copy(self) -> Model:
        return copy.deepcopy(self)

    def apply(self, act: Act) -> None:
        what, name, number = act
        getattr(self, f"_{what}")(name, number)

    # ---- acts --------------------------------------------------------------------------------------------------

    def _register(self, name: str, package: int) -> None:
        self._promote(name, self._stage(name, package))

    def _stage(self, name: str, package: int) -> int:
        known = self.names.setdefault(name, Name())
        number = known.numbers.setdefault(self.digests[package], len(known.numbers) + 1)
        known.live = sorted({*known.live, number})
        return number

    def _promote(self, name: str, number: int) -> None:
        known = self.names.get(name, Name())
        if number in known.live and number != known.current:
            known.history += [known.current] if known.current else []
            known.current = number

    def _roll_back(self, name: str, _: int) -> None:
        if name in ALIAS_OF:
            self._step_alias_back(name)
        else:
            self._step_back(self.names.get(name, Name()))

    def _remove(self, name: str, _: int) -> None:
        for number in list(self.names.get(name, Name()).live):
            self._remove_version(name, number)

    def _remove_version(self, name: str, number: int) -> None:
        known = self.names.get(name, Name())
        if number not in known.live:
            return
        known.live.remove(number)
        is_lost = known.current == number and not self._step_back(known)
        if is_lost or not known.live:
            known.current, known.history = 0, []
        for alias in [alias for alias, target in self.aliases.items() if target == (name, number)]:
            if not self._step_alias_back(alias):
                del self.aliases[alias], self.histories[alias]

    def _point(self, alias: str, number: int) -> None:
        target = (ALIAS_OF[alias], number)
        if number not in self.names.get(target[0], Name()).live or self.aliases.get(alias) == target:
            return
        self.histories.setdefault(alias, [])
        self.histories[alias] += [self.aliases[alias]] if alias in self.aliases else []
        self.aliases[alias] = target

    def _remove_alias(self, alias: str, _: int) -> None:
        self.aliases.pop(alias, None)
        self.histories.pop(alias, None)

    # ---- steps back --------------------------------------------------------------------------------------------

    def _step_back(self, known: Name) -> bool:
        left = list(known.history)
        while left:
            number = left.pop()
            if number in known.live and number != known.current:
                known.current, known.history = number, left
                return True
        return False

    def _step_alias_back(self, alias: str) -> bool:
        left = list(self.histories.get(alias, []))
        while left:
            name, number = left.pop()
            is_live = number in self.names.get(name, Name()).live
            if is_live and (name, number) != self.aliases[alias]:
                self.aliases[alias], self.histories[alias] = (name, number), left
                return True
        return False

    # ---- comparing ---------------------------------------------------------------------------------------------

    def picture(self) -> Mapping[str, object]:
        """All that can be seen of it."""
        live = {name: known for name, known in self.names.items() if known.live}
        return {
            "versions": {
                name: [(n, self._digest(known, n)) for n in known.live] for name, known in live.items()
            },
            "current": {name: known.current for name, known in live.items() if known.current},
            "aliases": dict(self.aliases),
        }

    def _digest(self, known: Name, number: int) -> str:
        return next(digest for digest, found in known.numbers.items() if found == number)


def picture_of(registry: Registry) -> Mapping[str, object]:
    """The same of a real registry."""
    entries = registry.entries(has_candidates=True)
    versions = {entry.ref.name: registry.versions(entry.ref.name) for entry in entries}
    return {
        "versions": {
            name: [(v.ref.version, v.ref.digest) for v in known] for name, known in versions.items()
        },
        "current": {entry.ref.name: entry.ref.version for entry in registry.entries()},
        "aliases": {alias.alias: (alias.name, alias.version) for alias in registry.pointers.aliases()},
    }


def apply_to(registry: Registry, packages: Sequence[str], act: Act) -> None:
    """Do the act; one that is refused changes nothing."""
    what, name, number = act
    try:
        match what:
            case "register":
                registry.register(name, Path(packages[number]))
            case "stage":
                registry.stage(name, Path(packages[number]))
            case "promote":
                registry.pointers.promote(f"{name}@{number}")
            case "roll_back":
                registry.pointers.roll_back(name)
            case "remove":
                registry.remove(name)
            case "remove_version":
                registry.remove(f"{name}@{number}")
            case "point":
                registry.pointers.point(name, f"{ALIAS_OF[name]}@{number}")
            case "remove_alias":
                registry.pointers.remove_alias(name)
            case _:
                raise ValueError(what)
    except AdapterError:
        return


ACTS_ON_NAMES = ("register", "stage", "promote", "roll_back", "remove", "remove_version")
ACTS_ON_ALIASES = ("point", "roll_back", "remove_alias")
