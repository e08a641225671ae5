"""Token ids -> text, as they come. Byte-exact: the pieces joined are the decoding of all ids, and no piece ends inside
a character.

A token of a byte-level vocabulary is bytes, not text: an emoji may be four tokens. Vocabulary knows each token's bytes;
a Detokenizer is one sequence's decoder, which keeps the first bytes of an unfinished character for later.
"""

from __future__ import annotations

import codecs
from typing import Final, Protocol

from tokenizers import Tokenizer, decoders

KEPT_SPECIALS: Final = frozenset({b"<tool_call>", b"</tool_call>"})
"""Text even where a tokenizer calls them special: the tool-call parser reads them. (Qwen's own does not.)"""


class TokenTable(Protocol):
    """What a token id stands for: a Vocabulary here, and ``base.processor.Processor`` is one too."""

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, also of a special one; empty for an id that names none."""

    def is_special(self, token_id: int) -> bool:
        """Is it no part of the text?"""


class Vocabulary:
    """What each token of a byte-level tokenizer stands for. Shared by all sequences, from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a tokenizer that is not byte-level."""
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise ValueError(
                f"the tokenizer's decoder is {type(tokenizer.decoder).__name__}; ByteLevel is needed"
            )
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._known: dict[
            int, bytes
        ] = {}  # grows to the vocabulary at most; a racing write repeats the same value

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, specials too; empty for an id that the tokenizer does not know."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read(token_id)
        return known

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _read(self, token_id: int) -> bytes:
        """Mirrors tokenizers' ByteLevel decoder: a token with a character outside the byte alphabet is plain UTF-8."""
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:
            return token.encode("utf-8")


class Detokenizer:
    """One sequence's text so far. ``feed`` each token once, then ``flush``."""

    def __init__(self, tokens: TokenTable) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; U+FFFD for bytes that no continuation could make valid."""
        return self._decoder.decode(self._text_bytes(token_id))

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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, every other byte for a character from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF: Final = _byte_alphabet()
