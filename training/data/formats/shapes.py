"""The formats: which fields each has, and how each becomes a Conversation.

Owns: the field names of every format that is read. Does not know: file syntax, tokens, models.
Place in a training run: between the rows of a file and the check of the whole data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final

from base.prompt import TextPart, ToolCall
from training.data.faults import FaultKind, Found, RowRejected
from training.data.formats.conversation import ASSISTANT
from training.data.formats.drafts import Draft, Parts
from training.data.formats.fields import Fields, as_fields, as_flag, as_text
from training.data.formats.pictures import PictureRef, PictureRoot


class Format(StrEnum):
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    ROLE_CONTENT = "role_content"
    OPENAI = "openai"
    QUERY_RESPONSE = "query_response"
    PROMPT_COMPLETION = "prompt_completion"


REQUIRED: Final[Mapping[Format, frozenset[str]]] = {
    Format.ALPACA: frozenset({"instruction", "output"}),
    Format.SHAREGPT: frozenset({"conversations"}),
    Format.ROLE_CONTENT: frozenset({"messages", "images"}),
    Format.OPENAI: frozenset({"messages"}),
    Format.QUERY_RESPONSE: frozenset({"query", "response"}),
    Format.PROMPT_COMPLETION: frozenset({"prompt", "completion"}),
}
"""Fields by which a format is known. Messages are role_content with a field ``images`` beside them, openai without."""


def formats_of(fields: Mapping[str, object]) -> list[Format]:
    """Every format whose fields are there."""
    found = [known for known, required in REQUIRED.items() if required <= fields.keys()]
    return [known for known in found if known != Format.OPENAI or Format.ROLE_CONTENT not in found]


def drafts_of(kind: Format, row: Fields, root: PictureRoot) -> tuple[list[Draft], list[PictureRef]]:
    """The row's turns, and the pictures for their tags. Raises RowRejected."""
    pictures = [] if kind == Format.OPENAI else _pictures(row, root)
    return _SHAPES[kind](row, root), pictures


def _pictures(row: Fields, root: PictureRoot) -> list[PictureRef]:
    """``images``: a list, or one picture by itself."""
    value = row.value("images")
    if isinstance(value, str | Mapping) and value:
        return [root.refer(value, "images")]
    return [root.refer(item, f"images[{i}]") for i, item in enumerate(row.items("images") if value else [])]


# ---- one question, one answer ----------------------------------------------------------------------------------


def _system(row: Fields) -> list[Draft]:
    text = row.optional_text("system")
    return [Draft("system", text, row.at("system"))] if text else []


def _history(row: Fields) -> list[Draft]:
    """Pairs [question, answer], before the row's own."""
    drafts = []
    for i, pair in enumerate(row.items("history")):
        field = f"{row.at('history')}[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRejected(
                FaultKind.BAD_VALUE, field, pair, "a pair [question, answer]", "give both, in a list"
            )
        drafts.append(Draft("user", as_text(pair[0], f"{field}[0]"), f"{field}[0]"))
        drafts.append(Draft(ASSISTANT, as_text(pair[1], f"{field}[1]"), f"{field}[1]"))
    return drafts


def _alpaca(row: Fields, root: PictureRoot) -> list[Draft]:
    """The instruction, and on a new line what it is about."""
    texts = [text for text in (row.text("instruction"), row.optional_text("input")) if text]
    question = Draft("user", "\n".join(texts), row.at("instruction"))
    return [*_system(row), *_history(row), question, Draft(ASSISTANT, row.text("output"), row.at("output"))]


def _query_response(row: Fields, root: PictureRoot) -> list[Draft]:
    """``loss`` is one flag for all answers, or one for each, the history's first."""
    turns = [
        *_history(row),
        Draft("user", row.text("query"), row.at("query")),
        Draft(ASSISTANT, row.text("response"), row.at("response")),
    ]
    flags = _loss_flags(row, len(turns) // 2)
    return [*_system(row), *(_flagged(turn, flags[i // 2]) for i, turn in enumerate(turns))]


def _loss_flags(row: Fields, count: int) -> list[bool]:
    value = row.value("loss")
    if not isinstance(value, list):
        return [row.flag("loss", True)] * count
    if len(value) != count:
        raise RowRejected(
            FaultKind.BAD_VALUE,
            row.at("loss"),
            value,
            f"{count} flags, one for each answer",
            "add or remove flags",
        )
    return [as_flag(item, f"{row.at('loss')}[{i}]") for i, item in enumerate(value)]


def _flagged(draft: Draft, is_trained: bool) -> Draft:
    return Draft(draft.role, draft.content, draft.field, is_trained, draft.tool_calls, draft.tool_call_id)


def _prompt_completion(row: Fields, root: PictureRoot) -> list[Draft]:
    """Two texts; or two lists of messages, of which the completion's alone are trained on."""
    if not isinstance(row.value("prompt"), list):
        question = Draft("user", row.text("prompt"), row.at("prompt"))
        return [*_system(row), question, Draft(ASSISTANT, row.text("completion"), row.at("completion"))]
    before = [_flagged(_message(item, root), False) for item in row.objects("prompt")]
    return [*_system(row), *before, *(_message(item, root) for item in row.objects("completion"))]


# ---- lists of turns --------------------------------------------------------------------------------------------

_SHAREGPT_ROLES: Final = {
    "human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "system": "system",
}  # fmt: skip
_ROLES: Final = {
    "user": "user", "assistant": ASSISTANT, "system": "system", "developer": "system", "tool": "tool",
}  # fmt: skip


def _role(fields: Fields, name: str, known: Mapping[str, str]) -> str:
    value = fields.text(name)
    if value not in known:
        raise RowRejected(
            FaultKind.ROLE_ORDER, fields.at(name), value, f"one of {', '.join(known)}",
            "rename the role; tool calls are read in the openai format",
        )  # fmt: skip
    return known[value]


def _sharegpt(row: Fields, root: PictureRoot) -> list[Draft]:
    drafts = []
    for item in row.objects("conversations"):
        role = _role(item, "from", _SHAREGPT_ROLES)
        drafts.append(Draft(role, item.text("value"), item.at("value"), item.flag("loss", True)))
        _refuse_unread(item)
    return [*_system(row), *drafts]


def _role_content(row: Fields, root: PictureRoot) -> list[Draft]:
    return [*_system(row), *(_message(item, root) for item in row.objects("messages"))]


def _openai(row: Fields, root: PictureRoot) -> list[Draft]:
    drafts = [_message(item, root) for item in row.objects("messages")]
    return [
        Draft(
            draft.role,
            (TextPart(draft.content),) if isinstance(draft.content, str) else draft.content,  # no tags here
            draft.field,
            draft.is_trained,
            draft.tool_calls,
            draft.tool_call_id,
        )
        for draft in drafts
    ]


def _message(item: Fields, root: PictureRoot) -> Draft:
    role = _role(item, "role", _ROLES)
    calls = tuple(_tool_call(call) for call in item.objects("tool_calls"))
    flag = item.flag("loss", item.flag("weight", True))
    call_id = item.value("tool_call_id")
    item.value("name")  # no chat template shows it
    content = _content(item, root, calls)
    _refuse_unread(item)
    return Draft(role, content, item.at("content"), flag, calls, None if call_id is None else str(call_id))


def _content(item: Fields, root: PictureRoot, calls: tuple[ToolCall, ...]) -> str | Parts:
    value = item.value("content")
    if value is None and calls:
        return ()
    if not isinstance(value, list):
        return item.text("content")
    return tuple(_part(part, root) for part in item.objects("content"))


def _part(part: Fields, root: PictureRoot) -> TextPart | PictureRef:
    kind = part.text("type")
    if kind == "text":
        return TextPart(part.text("text"))
    if kind == "image_url":
        value, field = part.value("image_url"), part.at("image_url")
        if isinstance(value, str):
            return root.refer(value, field)
        image = as_fields(value, field)
        return root.refer(image.text("url"), image.at("url"), image.optional_text("detail") or "auto")
    if kind == "image":
        return root.refer(part.value("image") or part.value("path"), part.at("image"))
    raise RowRejected(
        FaultKind.BAD_VALUE,
        part.at("type"),
        kind,
        "text or image_url",
        "remove the part: nothing else is learnt from",
    )


def _tool_call(call: Fields) -> ToolCall:
    function = as_fields(call.value("function"), call.at("function"))
    call.value("type")
    return ToolCall(call.optional_text("id"), function.text("name"), function.text("arguments"))


def _refuse_unread(item: Fields) -> None:
    for name in item.unread():
        raise RowRejected(
            FaultKind.BAD_VALUE, item.at(name), Found("a field that training does not use"),
            "only fields that are learnt from", "remove it from the message",
        )  # fmt: skip


_SHAPES: Final[Mapping[Format, Callable[[Fields, PictureRoot], list[Draft]]]] = {
    Format.ALPACA: _alpaca,
    Format.SHAREGPT: _sharegpt,
    Format.ROLE_CONTENT: _role_content,
    Format.OPENAI: _openai,
    Format.QUERY_RESPONSE: _query_response,
    Format.PROMPT_COMPLETION: _prompt_completion,
}
