"""Token ids -> text, as they come. Byte-exact: the pieces joined are the decoding of all ids, and no piece ends inside
a character.

A token of a byte-level vocabulary is bytes, not text: an emoji may be four tokens. The base's processor knows each
token's bytes; a Detokenizer is one sequence's decoder, keeping the first bytes of an unfinished character for later.
"""

from __future__ import annotations

import codecs
from typing import Final, Protocol

KEPT_SPECIALS: Final = frozenset({b"<tool_call>", b"</tool_call>"})
"""Text even where a tokenizer calls them special: the tool-call parser reads them. (Qwen's own does not.)"""


class TokenTable(Protocol):
    """What a token id stands for; ``base.processor.Processor`` is one."""

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, also of a special one; empty for an id that names none."""

    def is_special(self, token_id: int) -> bool:
        """Is it no part of the text?"""


class Detokenizer:
    """One sequence's text so far. ``feed`` each token once, then ``flush``."""

    def __init__(self, tokens: TokenTable) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; U+FFFD for bytes that no continuation could make valid."""
        return self._decoder.decode(self._text_bytes(token_id))

    def whole_text(self, token_id: int) -> str:
        """What ``feed`` would give outside a character, where the token is whole characters: it leaves no trace then.
        Empty where it is not, or has no text.
        """
        try:
            return self._text_bytes(token_id).decode()
        except UnicodeDecodeError:
            return ""

    @property
    def is_inside_character(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """At the end: U+FFFD for a character that was not finished."""
        return self._decoder.decode(b"", final=True)

    def _text_bytes(self, token_id: int) -> bytes:
        token = self._tokens.token_bytes(token_id)
        is_hidden = self._tokens.is_special(token_id) and token not in KEPT_SPECIALS
        return b"" if is_hidden else token
