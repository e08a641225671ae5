"""Tools for chat templates that know none: Qwen2.5-VL's template ignores them, Qwen2.5's spells them out like this.

The words are those of Qwen2.5-Instruct's chat template (Hermes style), on which Qwen2.5-VL's language model was
trained; tool calls and results go into plain messages the same way.

Owns: those words. Pure. Place in a request's way: step 3, under the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

from base.prompt import ImagePart, Message, TextPart, ToolCall

DEFAULT_SYSTEM: Final = "You are a helpful assistant."  # of Qwen2.5-VL's template
_PREAMBLE: Final = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
Hide = Callable[[str], str]


def spell_out_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]], hide: Hide
) -> list[Message]:
    """``messages`` with every text hidden by ``hide``, and tools, tool calls and results as text.

    Only our own words are left unhidden, so that ``<tool_call>`` becomes its token there and nowhere else.
    """
    hidden = [_hide_texts(message, hide) for message in messages]
    if tools:
        hidden = _with_preamble(hidden, tools, hide)
    spelt: list[Message] = []
    for is_tool, group in groupby(hidden, key=lambda message: message.role == "tool"):
        run = list(group)
        spelt += [_responses(run)] if is_tool else [_with_calls(message, hide) for message in run]
    return spelt


def parse_arguments(call: ToolCall) -> object:
    """The call's arguments as a JSON value; as the text they are when they are no JSON."""
    try:
        return json.loads(call.arguments)
    except ValueError:
        return call.arguments


def _hide_texts(message: Message, hide: Hide) -> Message:
    parts = tuple(TextPart(hide(p.text)) if isinstance(p, TextPart) else p for p in message.parts)
    return replace(message, parts=parts)


def _with_preamble(
    messages: list[Message], tools: Sequence[Mapping[str, object]], hide: Hide
) -> list[Message]:
    lines = "".join("\n" + hide(json.dumps(tool, ensure_ascii=False)) for tool in tools)
    preamble = TextPart(_PREAMBLE.format(tools=lines))
    if messages[0].role == "system":
        return [replace(messages[0], parts=_joined((*messages[0].parts, preamble))), *messages[1:]]
    return [Message("system", (TextPart(DEFAULT_SYSTEM + preamble.text),)), *messages]


def _with_calls(message: Message, hide: Hide) -> Message:
    if not message.tool_calls:
        return message
    calls = "\n".join(_call_text(call, hide) for call in message.tool_calls)
    has_content = any(isinstance(part, ImagePart) or part.text for part in message.parts)
    parts = (*message.parts, TextPart("\n" + calls if has_content else calls))
    return replace(message, parts=_joined(parts), tool_calls=())


def _call_text(call: ToolCall, hide: Hide) -> str:
    arguments = hide(json.dumps(parse_arguments(call), ensure_ascii=False))
    return f'<tool_call>\n{{"name": "{hide(call.name)}", "arguments": {arguments}}}\n</tool_call>'


def _responses(messages: Sequence[Message]) -> Message:
    """Consecutive tool messages are one user message."""
    parts: list[TextPart | ImagePart] = []
    for number, message in enumerate(messages):
        parts.append(TextPart("\n<tool_response>\n" if number else "<tool_response>\n"))
        parts += message.parts
        parts.append(TextPart("\n</tool_response>"))
    return Message("user", _joined(tuple(parts)))


def _joined(parts: tuple[TextPart | ImagePart, ...]) -> tuple[TextPart | ImagePart, ...]:
    """Neighbouring texts as one part."""
    joined: list[TextPart | ImagePart] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, TextPart) and isinstance(last, TextPart):
            joined[-1] = TextPart(last.text + part.text)
        else:
            joined.append(part)
    return tuple(joined)
