"""ToolCallParser: finds tool calls in generated text, as it comes. Qwen2.5's (Hermes') form:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

It knows text only. The two marks reach it as text because the detokenizer keeps them (``KEPT_SPECIALS``) even where a
tokenizer calls them special. A call is given out whole, once its JSON is known to be valid: until then it may turn out
to be plain text, which cannot be taken back from a stream. So no part of a mark is ever shown as text, and what is
malformed comes back as the text that it was.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse_constant(name))


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """``index`` counts the answer's calls from 0."""

    index: int
    name: str
    arguments: str
    """The model's own JSON text of an object, unchanged."""


ToolEvent = TextPiece | ParsedCall


class ToolCallParser:
    """``feed`` text in pieces of any size, then ``finish``; the events do not depend on where the pieces were cut, but
    for the cuts of TextPiece itself.

    White space between calls, before the first and behind the last one is layout, and dropped.
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._is_inside = False  # the buffer begins with OPEN
        self._scan = _StringScan()
        self._is_after_call = False  # only white space was seen since the last call
        self.num_calls = 0

    def feed(self, text: str) -> list[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while self._advance(events):
            pass
        return events

    def finish(self) -> list[ToolEvent]:
        """At the end: an unclosed call counts if its JSON is complete; anything else that was held back is text."""
        events: list[ToolEvent] = []
        if self._is_inside:
            self._give(events, self._buffer, self._buffer[len(OPEN) :])
        elif self._buffer and not (self._is_after_call and self._buffer.isspace()):
            events.append(TextPiece(self._buffer))
        self._buffer, self._is_inside = "", False
        return events

    def _advance(self, events: list[ToolEvent]) -> bool:
        """One move; False when more text is needed."""
        return self._read_call(events) if self._is_inside else self._read_text(events)

    def _read_text(self, events: list[ToolEvent]) -> bool:
        """Up to the next mark, or all but what may become white space and a mark."""
        start = self._buffer.find(OPEN)
        if start < 0:
            self._show(events, len(self._buffer) - _num_to_hold(self._buffer))
            return False
        lead = self._buffer[:start].rstrip()
        self._show(events, len(lead))
        self._layout, self._buffer = self._buffer[: -len(self._buffer.lstrip())] if False else "", self._buffer
        return True
