"""From the engine's messages to what a reader sees: Delta and, last, Finish.

TextAssembler owns one answer's text: it decodes, cuts at stop strings, holds back what may not be shown yet, and keeps
each token together with its text. It knows nothing of asyncio; engine/client.py's Stream drives it.
Place in a request's way: step 11.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.detokenizer import Detokenizer, TokenTable
from engine.messages import Finished, FinishReason, Started, Timings, TokenLogprob, Tokens, Usage
from engine.request import GenerationRequest
from engine.stopping import StopMatch, StopMatcher


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer; never empty text, except at the end or to carry the prompt's logprobs."""

    text: str
    token_ids: tuple[int, ...]
    """Tokens whose text ends in this piece; a token without text comes with the text that follows it, or at a limit
    with the last piece. What ended the answer (the end token, tokens that lie wholly inside a stop string) is in no
    Delta: it is counted in Usage only."""
    logprobs: tuple[TokenLogprob, ...]
    """One a token id, if they were asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def joined(self, later: Delta) -> Delta:
        """This piece and the next as one."""
        prompt_logprobs = self.prompt_logprobs if self.prompt_logprobs is not None else later.prompt_logprobs
        return Delta(
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            prompt_logprobs,
        )


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason
    stop: str | int | None
    """The stop string or the token id that ended it; None at a limit or after an abort."""
    usage: Usage
    timings: Timings


@dataclass(slots=True)
class _PendingToken:
    token_id: int
    logprob: TokenLogprob | None
    start: int
    """Characters of the whole text before this token's."""
    end: int
    """Characters of the whole text once this token's last character is complete."""


class TextAssembler:
    """Fed on one thread with one request's messages, in order."""

    def __init__(
        self, request: GenerationRequest, tokens: TokenTable, clock: Callable[[], float] = time.monotonic
    ) -> None:
        params = request.sampling
        self._request = request
        self._detokenizer = Detokenizer(tokens)
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output)
        self._has_stops = bool(params.stop)
        self._clock = clock
        self._pending: deque[_PendingToken] = deque()
        self._num_tokens = 0
        self._num_decoded = 0  # characters that the detokenizer gave
        self._num_shown = 0
        self._started: Started | None = None
        self._started_s: float | None = None
        self._first_token_s: float | None = None
        self.is_finished = False

    def push(self, message: Started | Tokens | Finished) -> list[Delta | Finish]:
        """What the message lets be read. After a Finish nothing more comes; if it came from Tokens (a stop string), the
        caller must tell the engine."""
        if self.is_finished:
            return []
        match message:
            case Started():
                self._started, self._started_s = message, self._clock()
                return []
            case Tokens():
                return self._push_tokens(message)
            case Finished():
                return self._push_finished(message)

    # ---- tokens ------------------------------------------------------------------------------------------------

    def _push_tokens(self, message: Tokens) -> list[Delta | Finish]:
        if message.token_ids and self._first_token_s is None:
            self._first_token_s = self._clock()
        plain = self._take_plain(message)
        if plain is not None:
            return [plain]
        logprobs = message.logprobs or (None,) * len(message.token_ids)
        text, match = "", None
        for token_id, logprob in zip(message.token_ids, logprobs, strict=True):
            shown, match = self._take(token_id, logprob)
            text += shown
            if match is not None:
                break
        delta = self._delta(text, is_last=match is not None)
        if message.prompt_logprobs is not None:
            delta = replace(delta, prompt_logprobs=message.prompt_logprobs)
        items: list[Delta | Finish] = (
            [delta] if text or delta.token_ids or delta.prompt_logprobs is not None else []
        )
        if match is not None:
            self.is_finished = True
            items.append(Finish("stop", match.stop, self._usage(), self._timings()))
        return items

    def _take_plain(self, message: Tokens) -> Delta | None:
        """The usual token: alone, of whole characters, after a text of which everything is shown. It is a piece as it
        is. None for any other, and then nothing was taken: ``_take`` knows them all, and gives the same for these.
        """
        if (
            self._has_stops
            or self._pending
            or message.prompt_logprobs is not None
            or len(message.token_ids) != 1
        ):
            return None  # a token that ends inside a character is pending
        token_id = message.token_ids[0]
        text = self._detokenizer.whole_text(token_id)
        if not text or token_id in self._request.sampling.stop_token_ids:
            return None
        self._num_tokens += 1
        self._num_decoded += len(text)
        self._num_shown += len(text)
        return Delta(text, message.token_ids, message.logprobs)

    def _take(self, token_id: int, logprob: TokenLogprob | None) -> tuple[str, StopMatch | None]:
        """Decode one token; the text that may now be shown."""
        self._num_tokens += 1
        if self._is_stop_token(token_id):
            return "", None  # the Finished that follows names it
        start = self._num_decoded
        text = self._detokenizer.feed(token_id)
        self._num_decoded += len(text)
        end = self._num_decoded + self._detokenizer.is_inside_character
        self._pending.append(_PendingToken(token_id, logprob, start, end))
        if self._num_tokens <= self._request.sampling.min_tokens:
            return text, None
        return self._matcher.feed(text)

    def _is_stop_token(self, token_id: int) -> bool:
        """Does a stop token id end it here? End-of-text tokens have no text anyway."""
        params = self._request.sampling
        if params.include_stop_str_in_output or self._num_tokens < params.min_tokens:
            return False
        return token_id in params.stop_token_ids

    def _delta(self, text: str, is_last: bool = False) -> Delta:
        """The piece ``text`` with the tokens that it completes; at the end, with all tokens that it shows any of."""
        self._num_shown += len(text)
        tokens = []
        while self._pending:
            token = self._pending[0]
            is_whole = token.end <= self._num_shown
            if token.start >= self._num_shown or not (is_whole or is_last):
                break
            tokens.append(self._pending.popleft())
        logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
        return Delta(text, tuple(token.token_id for token in tokens), logprobs)

    # ---- the end -----------------------------------------------------------------------------------------------

    def _push_finished(self, message: Finished) -> list[Delta | Finish]:
        rest = self._detokenizer.flush()
        self._num_decoded += len(rest)
        shown, match = self._matcher.feed(rest)
        delta = self._delta(shown + self._matcher.flush(), is_last=True)
        if match is None and message.reason != "stop":
            delta = delta.joined(self._textless())
        self.is_finished = True
        items: list[Delta | Finish] = [delta] if delta.text or delta.token_ids else []
        stop = match.stop if match is not None else message.stop_token_id
        reason = "stop" if match is not None else message.reason
        items.append(Finish(reason, stop, message.usage, message.timings))
        return items

    def _textless(self) -> Delta:
        """Cut off at a limit: tokens at the very end that have no text (ignored end tokens) belong to the answer."""
        tokens = list(self._pending)
        self._pending.clear()
        logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
        return Delta("", tuple(token.token_id for token in tokens), logprobs)

    def _usage(self) -> Usage:
        """Counted here: the engine may have gone on for a step or two after the token that completed the match."""
        prompt = self._request.prompt
        num_cached = self._started.cached_tokens if self._started is not None else 0
        num_image = sum(image.num_tokens for image in prompt.images)
        return Usage(len(prompt.ids), self._num_tokens, num_cached, num_image)

    def _timings(self) -> Timings:
        """As seen from here; the engine's own arrive with Finished."""
        now = self._clock()
        first_s = self._first_token_s if self._first_token_s is not None else now
        started_s = self._started_s if self._started_s is not None else first_s
        swap_s = self._started.swap_s if self._started is not None else 0.0
        return Timings(started_s - self._request.arrival_s, swap_s, first_s - started_s, now - first_s)
