"""Tokens: text to ids and back, where only trusted text may become special tokens.

Owns: two tokenizers over one vocabulary. The plain one has no added tokens, so whatever it is given stays text; the
full one decodes. Trusted text (a chat template's own) is split at added tokens here, as transformers would split it.

Does not know: messages, images, models. Immutable, so any number of threads may share it.
Place in a request's way: step 3 (encoding) and step 11 (decoding).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Final

from tokenizers import Tokenizer


class Tokens:
    """Both tokenizers, and the bytes behind every id."""

    def __init__(self, serialized: str) -> None:
        """``serialized`` is the content of a tokenizer.json: byte-level BPE."""
        self.full: Final = Tokenizer.from_str(serialized)
        self._plain: Final = Tokenizer.from_str(_without_added_tokens(serialized))
        added = self.full.get_added_tokens_decoder()
        self._special_ids: Final = frozenset(number for number, token in added.items() if token.special)
        self._added_ids: Final = {token.content: number for number, token in added.items()}
        longest_first = sorted(
            json.loads(serialized)["added_tokens"], key=lambda token: -len(token["content"])
        )
        self._pattern: Final = _added_token_pattern(longest_first)
        self._ids_of_groups: Final = tuple(int(token["id"]) for token in longest_first)
        self._bytes: Final = _token_bytes(self.full, self._added_ids)

    @property
    def size(self) -> int:
        """One more than the largest id that names a token."""
        return len(self._bytes)

    @property
    def added_token_chars(self) -> frozenset[str]:
        """First and last characters of added tokens: no added token can be spelt without them."""
        return frozenset(char for token in self._added_ids for char in (token[0], token[-1]))

    @property
    def sha256(self) -> str:
        """Hex SHA-256 over the bytes behind every id and which of them are special. Takes some 0.1 s for 150,000."""
        digest = hashlib.sha256()
        for number, data in enumerate(self._bytes):
            digest.update(b"%d %d %d " % (number, number in self._special_ids, len(data)) + data)
        return digest.hexdigest()

    def encode_plain(self, text: str) -> list[int]:
        """Ids of untrusted text: never an added token."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_trusted(self, text: str, unescape: Callable[[str], str]) -> list[int]:
        """Ids of ``text``, in which added tokens count; the text between them goes through ``unescape`` first."""
        ids: list[int] = []
        end = 0
        for match in self._pattern.finditer(text):
            ids += self.encode_plain(unescape(text[end : match.start()]))
            ids.append(self._ids_of_groups[(match.lastindex or 1) - 1])
            end = match.end()
        return ids + self.encode_plain(unescape(text[end:]))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD, ids that name no token nothing."""
        text: str = self.full.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token; empty for an id that names none."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def added_id(self, content: str) -> int | None:
        return self._added_ids.get(content)


def _without_added_tokens(serialized: str) -> str:
    description = json.loads(serialized)
    description["added_tokens"] = []
    description["post_processor"] = None  # may name added tokens; adds nothing that we want
    return json.dumps(description)


def _added_token_pattern(added: Sequence[dict[str, object]]) -> re.Pattern[str]:
    """One group for each added token, with what its flags let it take along; never matches when there are none.

    Where all begin alike and none takes white space along, a look at one character passes over ordinary text.
    """
    any_of = "|".join(f"({_flagged(re.escape(str(token['content'])), token)})" for token in added)
    if not any_of:
        return re.compile("(?!)")
    first = {str(token["content"])[0] for token in added}
    if len(first) > 1 or any(token.get("lstrip") for token in added):
        return re.compile(any_of)
    return re.compile(f"(?={re.escape(first.pop())})(?:{any_of})")


def _flagged(escaped: str, flags: dict[str, object]) -> str:
    left = r"\s*" if flags.get("lstrip") else ""
    right = r"\s*" if flags.get("rstrip") else ""
    if flags.get("single_word"):
        escaped = rf"(?<!\w){escaped}(?!\w)"
    return left + escaped + right


def _token_bytes(tokenizer: Tokenizer, added_ids: dict[str, int]) -> tuple[bytes, ...]:
    """Bytes by id: added tokens are their text, the rest goes through byte-level BPE's alphabet backwards."""
    alphabet = _byte_alphabet()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        is_plain = token not in added_ids and all(char in alphabet for char in token)
        table[number] = bytes(alphabet[char] for char in token) if is_plain else token.encode()
    return tuple(table)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte, as GPT-2's byte-level BPE defines it, to the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
