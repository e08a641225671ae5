"""Draft: a turn as a format gives it; and how drafts become a Conversation.

Owns: `<image>` tags, the order of roles, and that there is something to learn. Shared by every format, so that a fault
means the same in each. Does not know: files, field names of one format. Place in a training run: under the formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from base.prompt import TextPart, ToolCall
from training.data.faults import FaultKind, Found, RowRejected
from training.data.formats.conversation import ASSISTANT, Turn
from training.data.formats.pictures import PictureRef

TAG: Final = "<image>"
Parts = tuple[TextPart | PictureRef, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """One turn, and the field it came from."""

    role: str
    content: str | Parts
    """Text may hold tags; parts are final."""
    field: str
    is_trained: bool = True
    """Counts for assistants only."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


def finish(drafts: Sequence[Draft], pictures: Sequence[PictureRef]) -> tuple[Turn, ...]:
    """Turns in which each tag is its picture. Without any tag, the pictures stand before the first user text.

    Raises RowRejected: image_count, role_order, empty_target, no_label.
    """
    _check_order(drafts)
    placed = _with_pictures(drafts, pictures)
    for draft in placed:
        _check_answer(draft)
    turns = tuple(_turn(draft) for draft in placed)
    if not any(turn.is_trained for turn in turns):
        raise RowRejected(
            FaultKind.NO_LABEL, "", Found("a row whose every answer has its loss switched off"),
            "at least one answer to train on", "set loss to true for one, or remove the row",
        )  # fmt: skip
    return turns


def _turn(draft: Draft) -> Turn:
    parts = (TextPart(draft.content),) if isinstance(draft.content, str) else draft.content
    is_trained = draft.is_trained and draft.role == ASSISTANT
    return Turn(draft.role, parts, is_trained, draft.tool_calls, draft.tool_call_id)


# ---- pictures --------------------------------------------------------------------------------------------------


def _with_pictures(drafts: Sequence[Draft], pictures: Sequence[PictureRef]) -> list[Draft]:
    tags = sum(draft.content.count(TAG) for draft in drafts if isinstance(draft.content, str))
    if not tags and not pictures:
        return list(drafts)
    if not tags:
        return _in_front(drafts, pictures)
    if tags != len(pictures):
        raise RowRejected(
            FaultKind.IMAGE_COUNT, "images", Found(f"{len(pictures)} images for {tags} {TAG} tags"),
            "one tag for each image", "add what is missing, or remove what is too much",
        )  # fmt: skip
    remaining = iter(pictures)
    return [_tagged(draft, remaining) for draft in drafts]


def _in_front(drafts: Sequence[Draft], pictures: Sequence[PictureRef]) -> list[Draft]:
    first = next(i for i, draft in enumerate(drafts) if draft.role == "user")
    draft = drafts[first]
    own = (TextPart(draft.content),) if isinstance(draft.content, str) else draft.content
    return [*drafts[:first], _replaced(draft, (*pictures, *own)), *drafts[first + 1 :]]


def _tagged(draft: Draft, remaining: object) -> Draft:
    if not isinstance(draft.content, str) or TAG not in draft.content:
        return draft
    parts: list[TextPart | PictureRef] = []
    for number, text in enumerate(draft.content.split(TAG)):
        if number:
            parts.append(next(remaining))  # type: ignore[call-overload]
        if text:
            parts.append(TextPart(text))
    return _replaced(draft, tuple(parts))


def _replaced(draft: Draft, content: Parts) -> Draft:
    return Draft(draft.role, content, draft.field, draft.is_trained, draft.tool_calls, draft.tool_call_id)


# ---- order and answers -----------------------------------------------------------------------------------------

_MAY_FOLLOW: Final = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": (ASSISTANT,),
    ASSISTANT: ("user",),
    "calls": ("tool",),
    "tool": ("tool", ASSISTANT),
}


def _check_order(drafts: Sequence[Draft]) -> None:
    before = "start"
    for draft in drafts:
        if draft.role not in _MAY_FOLLOW[before]:
            expected = " or ".join(_MAY_FOLLOW[before])
            place = "first" if before == "start" else f"after {'tool calls' if before == 'calls' else before}"
            raise RowRejected(
                FaultKind.ROLE_ORDER, draft.field, Found(f"a turn of {draft.role} {place}"), expected,
                "system may come first, then user and assistant by turns; join or remove what stands between",
            )  # fmt: skip
        before = "calls" if draft.tool_calls else draft.role
    if before not in (ASSISTANT, "calls"):
        raise RowRejected(
            FaultKind.ROLE_ORDER, drafts[-1].field if drafts else "", Found(f"an end with {before}"),
            "an assistant's turn at the end", "add the answer to learn, or cut the row after the last one",
        )  # fmt: skip


def _check_answer(draft: Draft) -> None:
    if draft.role != ASSISTANT:
        return
    content = draft.content if isinstance(draft.content, tuple) else (TextPart(draft.content),)
    if any(isinstance(part, PictureRef) for part in content):
        raise RowRejected(
            FaultKind.IMAGE_COUNT, draft.field, Found("an image in an answer"), "images in user turns only",
            "move the image to the question: the model writes text",
        )  # fmt: skip
    text = "".join(part.text for part in content if isinstance(part, TextPart))
    if draft.is_trained and not text.strip() and not draft.tool_calls:
        raise RowRejected(
            FaultKind.EMPTY_TARGET, draft.field, text, "text to learn", "write the answer, or remove the row"
        )
