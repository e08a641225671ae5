"""ChatTemplate: messages to ids by the checkpoint's own jinja template, with user text kept apart from special tokens.

How: the characters that begin or end an added token (for Qwen ``<``, ``>``) are replaced by pairs of private-use
characters in everything a user may supply. After rendering, an added token that is still spelt out can only be the
template's own; the text between is put back as it was and encoded as plain text. So ids equal transformers'
``apply_chat_template`` for ordinary text, and differ where user text would have become a token.

Owns: the template. Templates come from hubs and are untrusted code: transformers renders them in its sandbox.
Does not know: images, pixels, models. Immutable. Place in a request's way: step 3.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from base.errors import InvalidMessage
from base.prompt import ImagePart, Message, TextPart
from base.tokens import Tokens
from base.tools import parse_arguments, spell_out_tools

_render: Final[Callable[..., Sequence[Sequence[str]]]] = (
    render_jinja_template  # its annotation is out of date
)
ROLES: Final = frozenset({"system", "user", "assistant", "tool"})
_PAIR: Final = re.compile("\ue000(.)", re.DOTALL)
_PROBE: Final = "probe of what the template shows"


class Escape:
    """Hides some characters of user text behind pairs of private-use characters; reversible for any text."""

    MARK: Final = "\ue000\ue001"
    """A pair that hiding never makes."""

    def __init__(self, chars: frozenset[str]) -> None:
        pairs = {char: f"\ue000{chr(0xE002 + i)}" for i, char in enumerate(sorted(chars | {"\ue000"}))}
        self._pairs: Final = str.maketrans(pairs)
        self._chars: Final = {pair: char for char, pair in pairs.items()}

    def hide(self, text: str) -> str:
        return text.translate(self._pairs)

    def show(self, text: str) -> str:
        return _PAIR.sub(lambda match: self._chars.get(match.group(), match.group()), text)

    def hide_all(self, value: object) -> object:
        """``hide`` every string, keys too, of a JSON value."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(str(key)): self.hide_all(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.hide_all(item) for item in value]
        return value


class ChatTemplate:
    """One checkpoint's chat template over its tokens."""

    def __init__(self, source: str, tokens: Tokens, named_tokens: Mapping[str, str]) -> None:
        """``named_tokens`` are what the template may call ``eos_token``, ``pad_token``, … ."""
        self._source = source
        self._tokens = tokens
        self._named_tokens = dict(named_tokens)
        self._escape = Escape(tokens.added_token_chars)
        self._has_tools = "tools" in source
        self._takes_strings = self._shows(_PROBE)
        self._takes_parts = self._shows([{"type": "text", "text": _PROBE}])
        if not (self._takes_strings or self._takes_parts):
            raise InvalidMessage("the chat template shows no user text")

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the template's source."""
        return hashlib.sha256(self._source.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> tuple[str, list[int]]:
        """The prompt's text, and its ids with one image token for each image.

        Raises InvalidMessage when the template cannot take these messages.
        """
        _check(messages, add_generation_prompt, continue_final_message)
        escape = self._escape
        if self._has_tools:
            hidden_tools = [escape.hide_all(tool) for tool in tools]
            chat = [self._dict_of(message, escape) for message in messages]
        else:
            hidden_tools = []
            chat = [self._dict_of(message, None) for message in spell_out_tools(messages, tools, escape.hide)]
        if continue_final_message:
            _mark_end(chat[-1], escape.MARK)
        text = self._run(chat, hidden_tools, add_generation_prompt)
        if continue_final_message:
            text = _cut(text, escape.MARK)
        return escape.show(text), self._tokens.encode_trusted(text, escape.show)

    def _dict_of(self, message: Message, escape: Escape | None) -> dict[str, object]:
        """As templates want it; ``escape`` None when the texts are hidden already."""
        hide = escape.hide if escape else str
        result: dict[str, object] = {"role": message.role, "content": self._content_of(message, escape)}
        if message.tool_calls and escape:
            result["tool_calls"] = [
                {
                    "id": hide(call.id),
                    "type": "function",
                    "function": {
                        "name": hide(call.name),
                        "arguments": escape.hide_all(parse_arguments(call)),
                    },
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None and escape:
            result["tool_call_id"] = hide(message.tool_call_id)
        return result

    def _content_of(self, message: Message, escape: Escape | None) -> str | list[dict[str, str]]:
        hide = escape.hide if escape else str
        texts = [hide(part.text) for part in message.parts if isinstance(part, TextPart)]
        has_images = any(isinstance(part, ImagePart) for part in message.parts)
        if self._takes_strings and not has_images and (len(texts) <= 1 or not self._takes_parts):
            return "".join(texts)
        if has_images and not self._takes_parts:
            raise InvalidMessage("this base's chat template takes no images: send text only")
        return [
            {"type": "text", "text": hide(part.text)} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.parts
        ]

    def _run(self, chat: list[dict[str, object]], tools: list[object], add_generation_prompt: bool) -> str:
        try:
            rendered: Sequence[str] = _render(
                [chat],
                tools=tools or None,
                chat_template=self._source,
                add_generation_prompt=add_generation_prompt,
                **self._named_tokens,
            )[0]
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise InvalidMessage(f"the base's chat template cannot take these messages: {error}") from error
        return rendered[0]

    def _shows(self, content: object) -> bool:
        try:
            return _PROBE in self._run([{"role": "user", "content": content}], [], True)
        except InvalidMessage:
            return False


def _check(messages: Sequence[Message], add_generation_prompt: bool, continue_final_message: bool) -> None:
    if not messages:
        raise InvalidMessage("there are no messages: give at least one")
    for message in messages:
        if message.role not in ROLES:
            raise InvalidMessage(f"unknown role {message.role!r}: use one of {', '.join(sorted(ROLES))}")
    if continue_final_message and messages[-1].tool_calls:
        raise InvalidMessage("the final message has tool calls, so it cannot be continued")
    if continue_final_message and add_generation_prompt:
        raise InvalidMessage(
            "a prompt either continues the final message or opens a new one: choose one of them"
        )


def _mark_end(message: dict[str, object], mark: str) -> None:
    """Put ``mark`` after the message's last text."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + mark
    elif isinstance(content, list) and content and content[-1].get("type") == "text":
        content[-1]["text"] += mark
    else:
        raise InvalidMessage("the final message does not end in text, so it cannot be continued")


def _cut(text: str, mark: str) -> str:
    end = text.rfind(mark)
    if end < 0:
        raise InvalidMessage(
            "the base's chat template does not show the final message, so it cannot be continued"
        )
    return text[:end]
