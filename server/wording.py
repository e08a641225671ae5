"""What may stand in a message: no path of this machine, nothing at length, nothing that is no UTF-8. Pure."""

from __future__ import annotations

import re

_HOST_PATH = re.compile(r"(?<![\w/:.])/(?:[^\s/'\"`:,;)]+/)+[^\s'\"`:,;)]*")
"""An absolute path of two or more parts. URLs do not match (a colon stands before), nor do names such as ``a/b``."""


def without_host_paths(text: str) -> str:
    """``text`` with absolute paths replaced: messages of the rooms below may name folders of this machine."""
    return _HOST_PATH.sub("<path>", text)


def shorten(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` characters, for echoing what a client sent."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def encodable(text: str) -> str:
    """Lone surrogates, which JSON of another maker can hold, are no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
