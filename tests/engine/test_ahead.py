"""May the next step be started before this one's tokens are known? A table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.ahead import Surroundings, rows_ahead
from engine.sampler import SamplerState
from engine.sampling import SamplingParams
from engine.sequence import Sequence
from engine.step import Chunk, StepPlan
from tests.support.requests import VOCAB_SIZE, make_request, make_sequence

QUIET = Surroundings()
MAX_LEN = 64


def decoding(num_prompt: int = 5, num_output: int = 2, **params: Any) -> Sequence:
    sequence = make_sequence("r", num_prompt, **params)
    sequence.output_ids = [1] * num_output
    for token_id in sequence.output_ids:
        sequence.sampler.accept(token_id)
    sequence.num_computed = sequence.num_tokens - 1
    return sequence


def plan_of(*sequences: Sequence) -> StepPlan:
    return StepPlan(tuple(Chunk(s, s.num_tokens - 1, 1) for s in sequences), ())


def test_rows_follow_their_sequences_in_order() -> None:
    first, second = decoding(), decoding(num_prompt=9)
    found = rows_ahead(plan_of(first, second), QUIET, MAX_LEN)
    assert [(c.sequence, c.start, c.num_tokens) for c in found] == [(first, 7, 1), (second, 11, 1)]


def test_two_steps_ahead_of_what_was_kept_is_the_row_after_the_row() -> None:
    """The plan itself may have been made ahead: its sequence lacks a token."""
    sequence = decoding()
    once = rows_ahead(plan_of(sequence), QUIET, MAX_LEN)
    sequence.output_ids.append(4)
    twice = rows_ahead(StepPlan(once, ()), QUIET, MAX_LEN)
    assert [(c.start, c.num_tokens) for c in twice] == [(8, 1)]


@pytest.mark.parametrize(
    "around",
    [Surroundings(has_messages=True), Surroundings(has_prompts=True), Surroundings(has_moves=True)],
    ids=["messages", "prompts", "moves"],
)
def test_whoever_wants_the_host_is_waited_for(around: Surroundings) -> None:
    assert rows_ahead(plan_of(decoding()), around, MAX_LEN) == ()


def test_a_place_that_is_known_to_become_free_is_given_away_first() -> None:
    last = decoding(num_output=5, max_tokens=6)
    queue = Surroundings(has_queue=True)
    assert len(rows_ahead(plan_of(decoding(), decoding()), queue, MAX_LEN)) == 2
    assert rows_ahead(plan_of(decoding(), last), queue, MAX_LEN) == ()
    assert len(rows_ahead(plan_of(decoding(), last), QUIET, MAX_LEN)) == 1


PARAMS: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({}, True),
    "drawn from all": ({"temperature": 1.0, "seed": 1}, True),
    "drawn without a seed": ({"temperature": 1.0}, True),
    "drawn from the best": ({"temperature": 1.0, "top_k": 5, "top_p": 0.5}, True),
    "min_p": ({"temperature": 1.0, "min_p": 0.1}, True),
    "top_p over all": ({"temperature": 1.0, "top_p": 0.5}, False),
    "top_p of a greedy one": ({"top_p": 0.5}, True),
    "top_p, top_k of all": ({"temperature": 1.0, "top_p": 0.5, "top_k": VOCAB_SIZE}, False),
    "log-probabilities": ({"logprobs": 0}, False),
    "bias": ({"logit_bias": ((1, 1.0),)}, False),
    "repetition": ({"repetition_penalty": 1.1}, False),
    "presence": ({"presence_penalty": 0.1}, False),
    "frequency": ({"frequency_penalty": 0.1}, False),
    "a stop": ({"stop_token_ids": (3,)}, True),
    "a stop string": ({"stop": ("x",)}, True),
    "an end that is forbidden": ({"stop_token_ids": (3,), "min_tokens": 3}, False),
    "an end that was forbidden": ({"stop_token_ids": (3,), "min_tokens": 2}, True),
    "nothing that could be forbidden": ({"min_tokens": 3}, True),
}


@pytest.mark.parametrize(("params", "may"), PARAMS.values(), ids=PARAMS.keys())
def test_rows_that_only_the_host_can_sample_hold_everybody(params: dict[str, Any], may: bool) -> None:
    plan = plan_of(decoding(), decoding(**params))
    assert len(rows_ahead(plan, QUIET, MAX_LEN)) == (2 if may else 0)


ROWS: dict[str, tuple[Callable[[], Chunk], int]] = {
    "a decode": (lambda: Chunk(decoding(), 6, 1), 2),
    "a prompt": (lambda: Chunk(make_sequence("r", 8), 0, 8), 0),
    "the last token of a prompt": (lambda: Chunk(make_sequence("r", 8), 7, 1), 0),
    "the last token but one": (lambda: Chunk(decoding(num_output=5, max_tokens=7), 9, 1), 2),
    "the last token": (lambda: Chunk(decoding(num_output=5, max_tokens=6), 9, 1), 1),
    "the last but one of the context": (lambda: Chunk(decoding(num_prompt=56, num_output=6), 61, 1), 2),
    "the last of the context": (lambda: Chunk(decoding(num_prompt=56, num_output=7), 62, 1), 1),
}


@pytest.mark.parametrize(("chunk", "count"), ROWS.values(), ids=ROWS.keys())
def test_a_row_beside_a_decode(chunk: Callable[[], Chunk], count: int) -> None:
    plan = StepPlan((*plan_of(decoding(num_prompt=4)).chunks, chunk()), ())
    assert len(rows_ahead(plan, QUIET, MAX_LEN)) == count


def test_logits_that_somebody_wants_to_see_hold_everybody() -> None:
    watched = decoding()
    request = make_request("r")
    watched.request = type(request)(
        "r", request.prompt, request.adapter, request.sampling, 0.0, on_logits=lambda logits: None
    )
    assert rows_ahead(plan_of(watched, decoding()), QUIET, MAX_LEN) == ()


def test_nothing_follows_nothing() -> None:
    assert rows_ahead(StepPlan((), ()), QUIET, MAX_LEN) == ()


def test_what_needs_no_host_once_never_does() -> None:
    """A state is asked before it was told of the token between: min_tokens only ever lets go."""
    state = SamplerState(SamplingParams(max_tokens=9, min_tokens=3, temperature=0.0), (1,), (2,), VOCAB_SIZE)
    needs = []
    for _ in range(5):
        needs.append(state.needs_host)
        state.accept(4)
    assert needs == [True, True, True, False, False]
