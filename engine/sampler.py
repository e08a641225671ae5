"""Sampler: logits in, one token a row out. SamplerState: what one sequence's sampling remembers.

It knows nothing of blocks, adapters or text. Sampling changes no state: a step that is retried chooses the same tokens.
Each row's result is to the bit the one that it would have alone.
Place in a request's way: step 9, between the runner's logits and the engine's commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.grammar import GrammarState
from engine.logprobs import score_prompt, score_tokens
from engine.messages import TokenLogprob
from engine.penalties import TokenCounts, apply_penalties, has_penalties
from engine.randomness import RandomStream
from engine.ranking import NO_TOKEN
from engine.sampling import SamplingParams
from engine.selection import Select, asks_device, select_tokens
from engine.upload import upload

__all__ = ["NumericalFailure", "SampledRow", "SampledToken", "Sampler", "SamplerState", "score_prompt"]


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None = None
    """Present when the request asked for logprobs."""


@dataclass(frozen=True, slots=True)
class NumericalFailure:
    """The row's logits hold NaN or plus infinity, or allow no token at all."""


SampledRow = SampledToken | NumericalFailure


class SamplerState:
    """Made once, at a sequence's birth; ``accept`` is told each token that was committed."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        vocab_size: int,
        grammar: GrammarState | None = None,
    ) -> None:
        """Raises ValueError for a token id in logit_bias or stop_token_ids that the vocabulary lacks."""
        self.params = params
        self.num_generated = 0
        self._random = RandomStream.from_seed(params.seed)
        self._counts = TokenCounts(prompt_ids) if has_penalties(params) else None
        self._bias = dict(params.logit_bias)
        self._enders = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})
        self._grammar = grammar
        self._is_shaped = bool(self._bias) or self._counts is not None or grammar is not None
        self._is_watched = params.logprobs is not None or asks_device(params, vocab_size)
        _require_in_vocabulary([*self._bias, *params.stop_token_ids], vocab_size)

    def accept(self, token_id: int) -> None:
        """The engine appended this token to the output. Never raises: a grammar that breaks tells at the next mask."""
        self.num_generated += 1
        if self._counts is not None:
            self._counts.add(token_id)
        if self._grammar is not None:
            self._grammar.advance(token_id)

    @property
    def is_complete(self) -> bool:
        """A grammar is in force and nothing but an end token may follow: the sequence may end without computing it."""
        return self._grammar is not None and self._grammar.is_complete

    @property
    def is_shaped(self) -> bool:
        """Must this step's logits be changed before a token is chosen?"""
        return self._is_shaped or self._may_not_end

    @property
    def needs_host(self) -> bool:
        """Must the host see this token, or its logits, before it can choose the next one? Once False, for good."""
        return self.is_shaped or self._is_watched

    def uniform(self, num_ahead: int = 0) -> float:
        """The random number of the next token, or of one so many behind it."""
        return self._random.uniform(self.num_generated + num_ahead)

    def shape(self, row: Tensor) -> None:
        """Mutates ``row``, [V] float32: logit_bias, penalties, min_tokens, grammar. Raises GrammarError."""
        if self._bias:
            ids = upload(list(self._bias), torch.int64, row.device)
            row[ids] += upload(list(self._bias.values()), row.dtype, row.device)
        if self._counts is not None:
            apply_penalties(row, self.params, self._counts)
        if self._grammar is not None:
            row.masked_fill_(~self._grammar.mask().to(row.device, non_blocking=True), -torch.inf)
        if self._may_not_end:
            self._forbid_end(row)

    @property
    def _may_not_end(self) -> bool:
        return self.num_generated < self.params.min_tokens and bool(self._enders)

    def _forbid_end(self, row: Tensor) -> None:
        """min_tokens yields to a grammar that allows nothing but the end."""
        open_row = row.clone() if self._grammar is not None else None
        row[upload(self._enders, torch.int64, row.device)] = -torch.inf
        if open_row is not None:
            row.copy_(torch.where(torch.isfinite(row.max()), row, open_row))


class Sampler:
    """Stateless but for the vocabulary's size, and who chooses."""

    def __init__(self, vocab_size: int, select: Select = select_tokens) -> None:
        self._vocab_size = vocab_size
        self._select = select

    @torch.inference_mode()
    def sample(self, logits: Tensor | Sequence[Tensor], states: Sequence[SamplerState]) -> list[SampledRow]:
        """S rows of [V] float32 (left unchanged) and the S sequences that they belong to -> S outcomes, in order.

        Raises GrammarError when a row's grammar cannot go on (too complex a state); the executor finds the culprit.
        """
        if not states:
            return []
        raw = logits if isinstance(logits, Tensor) else torch.stack(list(logits))  # [S, V]
        if raw.shape != (len(states), self._vocab_size):
            raise ValueError(f"logits are {tuple(raw.shape)}; expected {(len(states), self._vocab_size)}")
        uniforms = [state.uniform() for state in states]
        chosen = self.choose(raw, states, uniforms).tolist()  # the step's one copy to the host
        return self._report(chosen, raw, states)

    @torch.inference_mode()
    def choose(self, raw: Tensor, states: Sequence[SamplerState], uniforms: Sequence[float]) -> Tensor:
        """[S, V] float32 and each row's random number -> [S] int64 token ids, NO_TOKEN where the row is not sound.

        Waits for the device only where a state needs the host.
        """
        rows = self._shaped(raw, states)
        ids = self._select(rows, [state.params for state in states], uniforms)
        return ids if rows is raw else ids.masked_fill_(~torch.isfinite(raw.amax(-1)), NO_TOKEN)

    @staticmethod
    def _shaped(raw: Tensor, states: Sequence[SamplerState]) -> Tensor:
        """The rows as tokens are chosen from them: a copy where any must be changed, otherwise ``raw`` itself."""
        asking = [i for i, state in enumerate(states) if state.is_shaped]
        if not asking:
            return raw
        rows = raw.clone()
        for i in asking:
            states[i].shape(rows[i])
        return rows

    @staticmethod
    def _report(chosen: list[int], raw: Tensor, states: Sequence[SamplerState]) -> list[SampledRow]:
        asked = [i for i, s in enumerate(states) if s.params.logprobs is not None and chosen[i] != NO_TOKEN]
        logprobs: dict[int, TokenLogprob] = {}
        if asked:
            nums_top = [states[i].params.logprobs or 0 for i in asked]
            scores = score_tokens([raw[i] for i in asked], [chosen[i] for i in asked], nums_top)
            logprobs = dict(zip(asked, scores, strict=True))
        return [sampled(token_id, logprobs.get(i)) for i, token_id in enumerate(chosen)]


def sampled(token_id: int, logprob: TokenLogprob | None = None) -> SampledRow:
    """What a device's choice means: an id, or NO_TOKEN."""
    return NumericalFailure() if token_id == NO_TOKEN else SampledToken(token_id, logprob)


def _require_in_vocabulary(token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary (0 to {vocab_size - 1})")
