"""Ahead: which rows may be computed before the tokens of the step before them are known. Pure.

While the host reads a step's tokens, keeps them, sends them and plans the next step, a GPU would have nothing to do. So
where the next step is certain but for its inputs, which are on the device, it is started first. It is certain where
every row decodes, is sampled on the device, and nobody else is to be looked after in between. Sequences whose last
token this is, by length, have no row in it; one that ends otherwise, which only its token tells, has one for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.step import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What may want the host between this step and the next, beside the step's own rows."""

    has_messages: bool = False
    """Something is in the inbox: a newcomer, an abort, a load."""
    has_prompts: bool = False
    """A piece of a prompt may be in the next step, whoever ends."""
    has_queue: bool = False
    """Others wait for a place: whoever ends makes one."""
    has_moves: bool = False
    """An adapter is awaited, copied, proved or unloaded."""

    @property
    def is_quiet(self) -> bool:
        return not (self.has_messages or self.has_prompts or self.has_moves)


def rows_ahead(plan: StepPlan, around: Surroundings, max_model_len: int) -> tuple[Chunk, ...]:
    """The step after ``plan``, whose tokens nobody knows yet; () where it has to wait for them."""
    is_certain = around.is_quiet and all(chunk.is_decode and not chunk.needs_host for chunk in plan.chunks)
    if not is_certain:
        return ()
    rows = tuple(_next(chunk) for chunk in plan.chunks if _goes_on(chunk, max_model_len))
    makes_room = around.has_queue and len(rows) < len(plan.chunks)
    return () if makes_room else rows


def _next(chunk: Chunk) -> Chunk:
    return Chunk(chunk.sequence, chunk.end, 1)


def _goes_on(chunk: Chunk, max_model_len: int) -> bool:
    """Whether the token that the chunk chooses is not its sequence's last by length."""
    num_tokens = chunk.end + 1
    num_generated = num_tokens - chunk.sequence.num_prompt_tokens
    return num_generated < chunk.sequence.request.sampling.max_tokens and num_tokens < max_model_len
