"""Lifecycle: a sequence's birth, its tokens and its end, as messages for the outbox and events for the observer.

It keeps the times and decides when a sequence is finished; it frees nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from adapters.ref import AdapterRef
from adapters.residency import Residency
from engine.errors import EngineError
from engine.executor import Outcome
from engine.grammar import GrammarCompiler
from engine.messages import Failed, Finished, FinishReason, Outbound, Started, Timings, Tokens, Usage
from engine.observer import (
    AdapterLookup,
    EndReason,
    Event,
    FirstToken,
    NextToken,
    Observer,
    SequenceEnded,
    SequenceStarted,
)
from engine.request import GenerationRequest
from engine.sampler import SamplerState
from engine.sequence import Sequence


class Lifecycle:
    def __init__(
        self,
        residency: Residency,
        observer: Observer,
        grammars: GrammarCompiler,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self._residency = residency
        self._observer = observer
        self._grammars = grammars
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.outbox: list[Outbound] = []

    def take_outbox(self) -> list[Outbound]:
        messages, self.outbox = self.outbox, []
        return messages

    # ---- birth -------------------------------------------------------------------------------------------------

    def birth(self, request: GenerationRequest) -> Sequence:
        """Raises GrammarError, ValueError. A grammar was compiled before by ``EngineClient.compile_grammar``."""
        params = request.sampling
        grammar = self._grammars.compile(params.grammar).start() if params.grammar is not None else None
        sampler = SamplerState(params, request.prompt.ids, self._eos_token_ids, self._vocab_size, grammar)
        return Sequence(request, sampler)

    def is_on_device(self, sequence: Sequence) -> bool:
        return sequence.adapter.is_base or self._residency.slot_of(sequence.adapter) is not None

    def look_up(self, sequence: Sequence, is_on_device: bool, is_on_host: bool) -> None:
        if not sequence.adapter.is_base:
            self._tell(sequence, AdapterLookup(sequence.adapter, is_on_device, is_on_host))

    def absent_versions(self, sequence: Sequence) -> list[AdapterRef]:
        """Those that would have to be loaded for it. A composition may be made of what others have loaded."""
        if self.is_on_device(sequence):
            return []
        return [ref for ref in sequence.adapter.versions if self._residency.slot_of(ref) is None]

    def start(self, sequence: Sequence, now: float) -> None:
        """First scheduled: it has left the queue."""
        sequence.started_s = now
        queue_s = now - sequence.request.arrival_s
        self._tell(sequence, SequenceStarted(sequence.adapter, queue_s, sequence.swap_s))
        self.outbox.append(Started(sequence.request_id, sequence.swap_s, sequence.num_cached_tokens))

    def expired(self, sequences: Iterable[Sequence], now: float) -> list[Sequence]:
        return [s for s in sequences if self._is_expired(s, now)]

    @staticmethod
    def _is_expired(sequence: Sequence, now: float) -> bool:
        request = sequence.request
        age_s = now - request.arrival_s
        if request.total_timeout_s is not None and age_s > request.total_timeout_s:
            return True
        is_queued = sequence.started_s is None
        return is_queued and request.queue_timeout_s is not None and age_s > request.queue_timeout_s

    # ---- tokens ------------------------------------------------------------------------------------------------

    def advance(self, sequence: Sequence, outcome: Outcome, now: float) -> FinishReason | None:
        """Take one chunk's outcome into the sequence; a reason when that was its last."""
        sequence.num_computed = outcome.chunk.end
        self._take_prompt_logprobs(sequence, outcome)
        if outcome.token is not None:
            sequence.output_ids.append(outcome.token.token_id)
            sequence.sampler.accept(outcome.token.token_id)
            self._note_token(sequence, now)
            self._send_token(sequence, outcome)
        if sequence.num_computed < sequence.num_prompt_tokens:
            return None
        if sequence.request.sampling.max_tokens == 0:
            self._send_prompt_logprobs(sequence)
            return "length"
        return self._finish_reason(sequence) if outcome.token is not None else None

    def _take_prompt_logprobs(self, sequence: Sequence, outcome: Outcome) -> None:
        if outcome.chunk.start == 0:
            sequence.prompt_logprobs.clear()  # a preempted prefill starts again
        sequence.prompt_logprobs += outcome.prompt_logprobs

    def _send_token(self, sequence: Sequence, outcome: Outcome) -> None:
        self._send_prompt_logprobs(sequence)
        token = outcome.token
        if token is not None:
            logprobs = (token.logprob,) if token.logprob is not None else ()
            self.outbox.append(Tokens(sequence.request_id, (token.token_id,), logprobs))

    def _send_prompt_logprobs(self, sequence: Sequence) -> None:
        if sequence.request.prompt_logprobs is None or sequence.has_prompt_logprobs:
            return
        sequence.has_prompt_logprobs = True
        scored = (None, *sequence.prompt_logprobs)  # nothing predicts the first token
        self.outbox.append(Tokens(sequence.request_id, (), prompt_logprobs=scored))

    def _note_token(self, sequence: Sequence, now: float) -> None:
        if sequence.first_token_s is None:
            sequence.first_token_s = now
            since_s = now - sequence.request.arrival_s
            num_prompt, num_cached = sequence.num_prompt_tokens, sequence.num_cached_tokens
            self._tell(sequence, FirstToken(sequence.adapter, since_s, num_prompt, num_cached))
        elif sequence.last_token_s is not None:
            self._tell(sequence, NextToken(sequence.adapter, now - sequence.last_token_s))
        sequence.last_token_s = now

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params = sequence.request.sampling
        if self._stop_token(sequence) is not None or sequence.sampler.is_complete:
            return "stop"
        if len(sequence.output_ids) >= params.max_tokens or sequence.num_tokens >= self.max_model_len:
            return "length"
        return None

    def _stop_token(self, sequence: Sequence) -> int | None:
        """The last token, if it ends the sequence."""
        params = sequence.request.sampling
        if not sequence.output_ids or len(sequence.output_ids) < params.min_tokens:
            return None
        last = sequence.output_ids[-1]
        is_eos = last in self._eos_token_ids and not params.ignore_eos
        return last if is_eos or last in params.stop_token_ids else None

    # ---- ends --------------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: FinishReason, now: float) -> Finished:
        self._note_end(sequence, reason)
        stop_token_id = self._stop_token(sequence) if reason == "stop" else None
        usage, timings = _usage(sequence), _timings(sequence, now)
        return Finished(sequence.request_id, reason, stop_token_id, usage, timings)

    def fail(self, sequence: Sequence, error: EngineError) -> Failed:
        self._note_end(sequence, "error", type(error).__name__)
        return Failed(sequence.request_id, error)

    def _note_end(self, sequence: Sequence, reason: EndReason, error: str = "") -> None:
        seconds = time.monotonic() - sequence.request.arrival_s
        num_tokens = len(sequence.output_ids)
        self._tell(sequence, SequenceEnded(sequence.adapter, reason, seconds, num_tokens, error))

    def _tell(self, sequence: Sequence, event: Event) -> None:
        """What clients see is measured; background sequences nobody sees."""
        if not sequence.request.is_background:
            self._observer.record(event)


def _usage(sequence: Sequence) -> Usage:
    num_image_tokens = sum(image.num_tokens for image in sequence.request.prompt.images)
    return Usage(
        prompt_tokens=sequence.num_prompt_tokens,
        completion_tokens=len(sequence.output_ids),
        cached_tokens=sequence.num_cached_tokens,
        image_tokens=num_image_tokens,
    )


def _timings(sequence: Sequence, now: float) -> Timings:
    started_s = sequence.started_s if sequence.started_s is not None else now
    first_s = sequence.first_token_s if sequence.first_token_s is not None else now
    queue_s = started_s - sequence.request.arrival_s
    return Timings(queue_s, sequence.swap_s, first_s - started_s, now - first_s, sequence.num_preemptions)
