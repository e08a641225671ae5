"""Log-probabilities in the two forms of the wire: chat's list of objects and completions' parallel lists.

Pure. Place in a request's way: step 11.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from engine.messages import TokenLogprob

TokenBytes = Callable[[int], bytes]
FLOOR = -9999.0
"""JSON has no minus infinity; OpenAI and vLLM send this."""


def token_text(raw: bytes) -> str:
    """A token as text; part of a character as OpenAI's ``bytes:\\xe2\\x82``, so that no two tokens read the same."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    logprobs: Sequence[TokenLogprob], num_top: int, token_bytes: TokenBytes
) -> dict[str, object]:
    """A choice's ``logprobs``: one entry a token, each with up to ``num_top`` alternatives."""
    content = []
    for logprob in logprobs:
        entry = _entry(logprob.token_id, logprob.logprob, token_bytes)
        entry["top_logprobs"] = [_entry(i, value, token_bytes) for i, value in logprob.top[:num_top]]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, object]:
    raw = token_bytes(token_id)
    return {"token": token_text(raw), "logprob": max(logprob, FLOOR), "bytes": list(raw)}


class CompletionLogprobs:
    """One choice's tokens as completions' lists, piece by piece: ``text_offset`` counts from the text's beginning."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], num_top: int
    ) -> dict[str, object]:
        """The lists for the next ``tokens``; None stands for a prompt's first token, which nothing predicts."""
        offsets = [self._advance(token) for token in tokens]
        return {
            "tokens": [token_text(self._token_bytes(token)) for token in tokens],
            "token_logprobs": [None if entry is None else max(entry.logprob, FLOOR) for entry in logprobs],
            "top_logprobs": [None if entry is None else self._top(entry, num_top) for entry in logprobs],
            "text_offset": offsets,
        }

    def _advance(self, token: int) -> int:
        """Where the token's text begins; a character split over tokens counts where it is completed."""
        offset = self._offset
        self._offset += len(self._decoder.decode(self._token_bytes(token)))
        return offset

    def _top(self, entry: TokenLogprob, num_top: int) -> dict[str, float]:
        """The likeliest ``num_top`` and the token itself, as in OpenAI's and vLLM's."""
        pairs = [*entry.top[:num_top], (entry.token_id, entry.logprob)]
        return {token_text(self._token_bytes(i)): max(value, FLOOR) for i, value in reversed(pairs)}
