"""ToolCallParser: finds tool calls in generated text, as it comes. Qwen2.5's (Hermes') form:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

It knows text only. The two marks reach it as text because the detokenizer keeps them (``KEPT_SPECIALS``) even where a
tokenizer calls them special. A call is given out whole, once its JSON is known to be valid: until then it may turn out
to be plain text, which cannot be taken back from a stream. So no part of a call's mark is ever shown as text, and what
is malformed comes back as the text that it was.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final, NoReturn

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
SPACE: Final = " \t\r\n"

_SPACES: Final = re.compile(r"[ \t\r\n]*")
_SCANNED: Final = re.compile(r'\\.|"|\n|</tool_call>', re.DOTALL)


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """``index`` counts the answer's calls from 0."""

    index: int
    name: str
    arguments: str
    """The model's own JSON text of an object."""


ToolEvent = TextPiece | ParsedCall


class ToolCallParser:
    """``feed`` text in pieces of any size, then ``finish``. Where the pieces are cut changes only TextPieces' own cuts.

    White space around a call is layout, and dropped.
    """

    def __init__(self) -> None:
        self._buffer = ""  # not given out yet; inside a call it begins with OPEN
        self._layout = ""  # white space before that OPEN
        self._is_inside = False
        self._is_after_call = False  # nothing but white space since the last call
        self._num_scanned = 0
        self._is_in_string = False
        self.num_calls = 0

    def feed(self, text: str) -> list[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while self._read_call(events) if self._is_inside else self._read_text(events):
            pass
        return events

    def finish(self) -> list[ToolEvent]:
        """At the end: an unclosed call counts if its JSON is complete; whatever else was held back is text."""
        events: list[ToolEvent] = []
        while self._is_inside:
            self._settle(events, len(self._buffer), len(self._buffer))
            self._read_text(events)
        rest = self._buffer.lstrip(SPACE) if self._is_after_call else self._buffer
        self._show(events, rest)
        self._buffer = ""
        return events

    # ---- outside a call ----------------------------------------------------------------------------------------

    def _read_text(self, events: list[ToolEvent]) -> bool:
        """Give out text up to the next mark, or all but what may become one. True when a call has begun."""
        if self._is_after_call:
            self._buffer = self._buffer.lstrip(SPACE)
        start = self._buffer.find(OPEN)
        if start < 0:
            end = len(self._buffer) - _num_undecided(self._buffer)
            text, self._buffer = self._buffer[:end], self._buffer[end:]
            self._show(events, text)
            return False
        text = self._buffer[:start].rstrip(SPACE)
        self._layout, self._buffer = self._buffer[len(text) : start], self._buffer[start:]
        self._show(events, text)
        self._is_inside, self._is_in_string, self._num_scanned = True, False, len(OPEN)
        return True

    def _show(self, events: list[ToolEvent], text: str) -> None:
        if text:
            events.append(TextPiece(text))
            self._is_after_call = False

    # ---- inside a call -----------------------------------------------------------------------------------------

    def _read_call(self, events: list[ToolEvent]) -> bool:
        """Settle the call once its end is there. True when it is."""
        for match in _SCANNED.finditer(self._buffer, self._num_scanned):
            self._num_scanned = match.end()
            if match.group() == CLOSE and not self._is_in_string:
                self._settle(events, match.start(), match.end())
                return True
            if match.group() == '"':
                self._is_in_string = not self._is_in_string
            elif match.group() == "\n":
                self._is_in_string = False  # JSON strings have no raw line breaks: this one was malformed
        self._num_scanned = max(self._num_scanned, len(self._buffer) - len(CLOSE))
        return False

    def _settle(self, events: list[ToolEvent], body_end: int, end: int) -> None:
        """The buffer's call reaches to ``end``: give it out, as a call or as text."""
        call = _parse(self._buffer[len(OPEN) : body_end])
        self._is_inside = False
        if call is not None:
            name, arguments = call
            events.append(ParsedCall(self.num_calls, name, arguments))
            self.num_calls += 1
            self._is_after_call = True
            self._buffer = self._buffer[end:]
            return
        inner = self._buffer.rfind(OPEN, len(OPEN), body_end)  # the last mark may begin a sound call
        wrong = self._layout + self._buffer[: inner if inner > 0 else end]
        text = wrong.rstrip(SPACE) if inner > 0 else wrong
        self._show(events, text)
        self._buffer = wrong[len(text) :] + self._buffer[inner if inner > 0 else end :]


def _num_undecided(text: str) -> int:
    """Length of the end of ``text`` that may become white space and a mark."""
    num_mark = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
    before = text[: len(text) - num_mark]
    return num_mark + len(before) - len(before.rstrip(SPACE))


def _parse(body: str) -> tuple[str, str] | None:
    """The name and the arguments' JSON text; None for anything but one sound call."""
    try:
        members = _read_object(body)
        name = _DECODER.decode(members["name"])
        arguments = members.get("arguments", "{}")
        value = _DECODER.decode(arguments)
        if isinstance(value, str):  # some models quote the object once more
            arguments, value = value, _DECODER.decode(value)
    except (ValueError, KeyError, RecursionError):
        return None
    is_sound = isinstance(name, str) and name != "" and isinstance(value, dict)
    return (name, arguments) if is_sound else None


def _read_object(text: str) -> dict[str, str]:
    """A JSON object's members, each value as its own piece of the text. Raises ValueError."""
    members: dict[str, str] = {}
    at = _expect(text, _skip(text, 0), "{")
    if text[at : at + 1] == "}":
        raise ValueError("no members")
    while True:
        key, at = _DECODER.raw_decode(text, at)
        start = _expect(text, _skip(text, at), ":")
        _, at = _DECODER.raw_decode(text, start)
        members[key] = text[start:at]
        at = _skip(text, at)
        if text[at : at + 1] != ",":
            break
        at = _skip(text, at + 1)
    if _skip(text, _expect(text, at, "}")) != len(text):
        raise ValueError("text behind the object")
    return members


def _skip(text: str, at: int) -> int:
    match = _SPACES.match(text, at)
    return match.end() if match is not None else at


def _expect(text: str, at: int, character: str) -> int:
    """The place behind ``character`` and the white space that follows it."""
    if text[at : at + 1] != character:
        raise ValueError(f"expected {character}")
    return _skip(text, at + 1)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
