"""Spelling: which names may be given to adapters and to aliases. Knows the base's own names, and nothing registered."""

from __future__ import annotations

import re
from collections.abc import Collection

from adapters.errors import InvalidAdapterName
from adapters.ref import BASE

_NAME = re.compile(r"(?:[A-Za-z0-9._-]{1,96}/)?[A-Za-z0-9._-]{1,96}")
_ALIAS = re.compile(r"(?:[A-Za-z0-9._:-]{1,96}/)?[A-Za-z0-9._:-]{1,96}")
"""A colon too, as in OpenAI's ``ft:...``."""
_ONLY_DOTS = re.compile(r"(?:.*/)?\.+|\.+/.*")


class Spelling:
    """``base_names`` are all names of the served base, its hub id among them if it has one."""

    def __init__(self, base_names: Collection[str]) -> None:
        self._reserved = {name.casefold() for name in (*base_names, BASE.name)}

    def is_base(self, name: str) -> bool:
        return name.casefold() in self._reserved

    def check_name(self, name: str) -> None:
        """Raises InvalidAdapterName."""
        if not _NAME.fullmatch(name) or _ONLY_DOTS.fullmatch(name):
            raise InvalidAdapterName(
                name, "use 1 to 96 letters, digits, '.', '_' and '-', and at most one 'org/' before them"
            )
        if self.is_base(name):
            raise InvalidAdapterName(name, "it names the base")

    def check_alias(self, alias: str) -> None:
        """Raises InvalidAdapterName. ``<base>:…`` is how a request names an adapter of that base."""
        if not _ALIAS.fullmatch(alias) or _ONLY_DOTS.fullmatch(alias):
            raise InvalidAdapterName(
                alias,
                "use 1 to 96 letters, digits, '.', '_', ':' and '-', and at most one 'org/' before them",
            )
        if self.is_base(alias.partition(":")[0]):
            raise InvalidAdapterName(alias, "it begins with a name of the base")
