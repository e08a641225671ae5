"""Conversation: one row of a data file in the one form that the rest of training knows, whatever format it came in.

Owns: the frozen value, and its identity by content. Pictures stay references; nothing is decoded until ``messages``.
Does not know: formats, tokens, models. Place in a training run: made by the readers, kept until the last step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from PIL import Image

from base.prompt import ImagePart, Message, TextPart, ToolCall
from training.data.faults import Origin
from training.data.formats.pictures import PictureRef

ASSISTANT: Final = "assistant"
_BLANK: Final = Image.new("RGB", (1, 1))


@dataclass(frozen=True, slots=True)
class Turn:
    """One message, its pictures unopened."""

    role: str
    parts: tuple[TextPart | PictureRef, ...]
    is_trained: bool = False
    """Whether its tokens are labels; only an assistant's may be."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def pictures(self) -> tuple[PictureRef, ...]:
        return tuple(part for part in self.parts if isinstance(part, PictureRef))

    def message(self, show: Callable[[PictureRef], ImagePart]) -> Message:
        """As the processor takes it, each picture as ``show`` gives it."""
        parts = tuple(part if isinstance(part, TextPart) else show(part) for part in self.parts)
        return Message(self.role, parts, self.tool_calls, self.tool_call_id)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row, checked for roles and fields. Equal by content; ``origin`` does not count."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    """OpenAI's, as JSON values."""
    origin: Origin = field(default=Origin("", 0), compare=False)

    @property
    def loss(self) -> tuple[bool, ...]:
        """For each assistant turn, whether it is trained on."""
        return tuple(turn.is_trained for turn in self.turns if turn.role == ASSISTANT)

    @property
    def pictures(self) -> tuple[PictureRef, ...]:
        return tuple(picture for turn in self.turns for picture in turn.pictures)

    def messages(self) -> tuple[Message, ...]:
        """For ``Processor.prepare_chat``, pictures decoded now. Raises RowRejected for one that cannot be."""
        return tuple(turn.message(PictureRef.open) for turn in self.turns)

    def blank_messages(self) -> tuple[Message, ...]:
        """The same with one pixel for every picture: enough for ids in which a picture is one token."""
        return tuple(turn.message(lambda _: ImagePart(_BLANK)) for turn in self.turns)

    def digest(self) -> str:
        """Hex SHA-256 of all that is learnt from: words, roles, flags, tools, and the pictures' bytes."""
        return _digest([self.tools, [_identity(turn, True) for turn in self.turns]])

    def question_digest(self) -> str:
        """Hex SHA-256 of what stands before the first trained answer; rows that share it ask the same."""
        first = next((i for i, turn in enumerate(self.turns) if turn.is_trained), len(self.turns))
        return _digest([self.tools, [_identity(turn, False) for turn in self.turns[:first]]])


def _identity(turn: Turn, with_flag: bool) -> list[object]:
    parts = [part.text if isinstance(part, TextPart) else [part.digest(), part.detail] for part in turn.parts]
    calls = [[call.name, call.arguments] for call in turn.tool_calls]
    return [turn.role, parts, calls, turn.is_trained and with_flag]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
