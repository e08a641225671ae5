"""The start page: one screen that says where the server is, what it holds, and one line to paste. Text only, pure."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH = 110
BAR = 30
"""Characters of the longest memory bar."""


@dataclass(frozen=True, slots=True)
class StartPage:
    url: str
    base: str
    device: str
    adapters: Sequence[str]
    skipped: Mapping[str, str]
    """Packages that were refused: name to reason."""
    memory: Mapping[str, int]
    """Bytes by part, at most."""
    settings: Sequence[tuple[str, str, str]]
    """(name, value, origin)."""
    has_keys: bool
    picture: Path | None
    version: str
    notes: Sequence[str] = ()
    budget_bytes: int | None = None
    """What the parts were fitted into; None where nothing bounds them."""

    def text(self) -> str:
        blocks = [
            self._head(),
            self._memory(),
            self._settings(),
            self._skipped(),
            list(self.notes),
            self._example(),
        ]
        return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"

    def _head(self) -> list[str]:
        names = ", ".join(self.adapters[:8]) + (
            f" and {len(self.adapters) - 8} more" if len(self.adapters) > 8 else ""
        )
        return [
            f"Lorikeet {self.version} serves {self.base} on {self.device}",
            f"  OpenAI API  {self.url}/v1          docs  {self.url}/docs          metrics  {self.url}/metrics",
            f"  adapters    {names or 'none yet: lorikeet adapters add NAME FOLDER'}",
        ]

    def _memory(self) -> list[str]:
        parts = {name: count for name, count in self.memory.items() if count}
        largest, total = max(parts.values(), default=1), sum(parts.values())
        lines = [
            f"  {name:<16} {_size(count):>9}  {'█' * max(1, round(BAR * count / largest))}"
            for name, count in parts.items()
        ]
        bound = "" if self.budget_bytes is None else f" of {_size(self.budget_bytes)}"
        return [f"Memory, {_size(total)}{bound}, by part at most", *lines] if lines else []

    def _settings(self) -> list[str]:
        chosen = [
            f"  {name} = {value}  ({origin})" for name, value, origin in self.settings if origin != "default"
        ]
        defaults = ", ".join(
            f"{name}={value}" for name, value, origin in self.settings if origin == "default"
        )
        wrapped = textwrap.wrap(f"default: {defaults}", WIDTH, initial_indent="  ", subsequent_indent="    ")
        return ["Settings", *chosen, *wrapped]

    def _skipped(self) -> list[str]:
        lines = [
            textwrap.shorten(f"  {name}: {why}", WIDTH * 2) for name, why in list(self.skipped.items())[:5]
        ]
        more = len(self.skipped) - len(lines)
        return (
            ["Not registered", *lines, *([f"  and {more} more: see the log"] if more > 0 else [])]
            if lines
            else []
        )

    def _example(self) -> list[str]:
        return [
            "Try it, in another terminal:",
            curl_line(self.url, self.adapters, self.picture, self.has_keys),
        ]


def curl_line(url: str, adapters: Sequence[str], picture: Path | None, has_keys: bool) -> str:
    """One line for a POSIX shell that asks about the picture through the first adapter."""
    model = adapters[0] if adapters else "base"
    key = ' -H "authorization: Bearer $LORIKEET_API_KEY"' if has_keys else ""
    head = f"curl -s {url}/v1/chat/completions -H 'content-type: application/json'{key} -d "
    body = f'{{"model":"{model}","temperature":0,"messages":[{{"role":"user","content":'
    if picture is None:
        return f"""{head}'{body}"Hello! Who are you?"}}]}}'"""
    kind = "jpeg" if picture.suffix.lower() in (".jpg", ".jpeg") else picture.suffix.lower().lstrip(".")
    before = f'{body}[{{"type":"image_url","image_url":{{"url":"data:image/{kind};base64,'
    after = '"}},{"type":"text","text":"What do you see?"}]}]}'
    data = f"\"$(base64 < {shlex.quote(str(picture))} | tr -d '\\n')\""
    return f"{head}'{before}'{data}'{after}'"


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
