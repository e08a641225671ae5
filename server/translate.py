"""Wire requests -> GenerationRequests, one a choice. What costs nothing is refused first, before pictures are loaded.

Nothing has been allocated in the engine when this is done. Knows nothing of responses.
Place in a request's way: step 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapters.ref import AdapterRef
from base.prompt import PromptInputs
from engine.errors import Draining, EngineDown, GrammarError, QueueFull
from engine.request import GenerationRequest
from engine.sampling import GrammarSpec, SamplingParams
from server.errors import invalid_request
from server.profiles import Profile, profile_of
from server.prompts import chat_prompt, num_waiting_for_preparers, text_prompt
from server.sampling import biases, grammar_of, max_tokens_for, sampling_params, seed_of
from server.schemas import ChatRequest, CompletionRequest
from server.schemas.completions import DEFAULT_MAX_TOKENS
from server.state import ServerState
from server.tools import tool_grammar_of

RETRY_AFTER_S = 1.0
Pair = tuple[PromptInputs, SamplingParams]


@dataclass(frozen=True, slots=True)
class Origin:
    """What all choices of one wire request share."""

    response_id: str
    adapters: tuple[AdapterRef, ...]
    """Each answers the same prompts, as its profile has them."""
    arrival_s: float
    """``time.monotonic()`` when the route began."""


def require_room(state: ServerState) -> None:
    """Refuse before any work what the engine would refuse after it. Raises Draining, EngineDown or QueueFull."""
    status = state.engine.status()
    if status.is_draining:
        raise Draining("the server is draining; send the request to another one")
    if not status.is_alive:
        raise EngineDown("the engine is not running; try again shortly")
    num_waiting = sum(status.waiting.values()) + num_waiting_for_preparers()
    limit = state.settings.max_waiting
    if num_waiting >= limit:
        raise QueueFull(
            f"{num_waiting} requests are waiting, the limit is {limit}: try again later", RETRY_AFTER_S
        )


async def translate_chat(
    request: ChatRequest, origin: Origin, state: ServerState
) -> tuple[GenerationRequest, ...]:
    """One GenerationRequest a choice: those of the first adapter, then those of the next.

    Those whose profiles are equal share one prompt, whose pictures were loaded and prepared once. Raises WireError, or
    an error that ``to_wire`` knows.
    """
    biases(request.logit_bias, state.processor.vocab_size)
    made: dict[str, Pair] = {}
    pairs = []
    for adapter in origin.adapters:
        profile = profile_of(adapter, state)
        if profile.text not in made:
            made[profile.text] = await _chat_pair(profile.complete(request), profile, state)
        pairs.append((adapter, made[profile.text]))
    return _requests(pairs, request.n, origin, state)


async def _chat_pair(request: ChatRequest, profile: Profile, state: ServerState) -> Pair:
    grammar = await _compiled(tool_grammar_of(request), "tools", state)
    if grammar is None:
        grammar = await _compiled(grammar_of(request.response_format), "response_format", state)
    prompt = await chat_prompt(request, state, profile)
    room = state.max_model_len - len(prompt.ids)
    wanted = profile.answer_tokens(request.wanted_tokens, request.min_tokens, room)
    params = sampling_params(
        request,
        max_tokens=max_tokens_for(len(prompt.ids), wanted, state.max_model_len, "messages"),
        vocab_size=state.processor.vocab_size,
        logprobs=request.num_logprobs,
        grammar=grammar,
    )
    return prompt, params


async def translate_completion(
    request: CompletionRequest, origin: Origin, state: ServerState
) -> tuple[GenerationRequest, ...]:
    """One GenerationRequest a choice: the choices of the first prompt, then those of the next."""
    biases(request.logit_bias, state.processor.vocab_size)
    pairs = []
    for adapter in origin.adapters:
        profile = profile_of(adapter, state)
        completed = profile.complete(request)
        grammar = await _compiled(grammar_of(completed.response_format), "response_format", state)
        for prompt in request.prompts:
            inputs = await text_prompt(prompt, state)
            params = _completion_params(completed, profile, len(inputs.ids), grammar, state)
            pairs.append((adapter, (inputs, params)))
    return _requests(pairs, request.n, origin, state, request.logprobs if request.echo else None)


def _completion_params(
    request: CompletionRequest,
    profile: Profile,
    num_prompt_tokens: int,
    grammar: GrammarSpec | None,
    state: ServerState,
) -> SamplingParams:
    wanted = request.wanted_tokens
    if request.max_tokens is None:
        room = state.max_model_len - num_prompt_tokens
        usual = profile.answer_tokens(None, request.min_tokens, room)
        wanted = max(1, min(DEFAULT_MAX_TOKENS, room)) if usual is None else usual
    return sampling_params(
        request,
        max_tokens=max_tokens_for(num_prompt_tokens, wanted, state.max_model_len, "prompt"),
        vocab_size=state.processor.vocab_size,
        logprobs=request.logprobs,
        grammar=grammar,
    )


async def _compiled(spec: GrammarSpec | None, param: str, state: ServerState) -> GrammarSpec | None:
    """``spec``, once the engine has it compiled. Raises WireError 400 where it cannot be."""
    if spec is not None:
        try:
            await state.engine.compile_grammar(spec)
        except GrammarError as error:
            raise invalid_request(str(error), param) from error
    return spec


def _requests(
    pairs: Sequence[tuple[AdapterRef, Pair]],
    n: int,
    origin: Origin,
    state: ServerState,
    prompt_logprobs: int | None = None,
) -> tuple[GenerationRequest, ...]:
    choices = itertools.product(pairs, range(n))
    return tuple(
        GenerationRequest(
            request_id=f"{origin.response_id}-{index}",
            prompt=prompt,
            adapter=adapter,
            sampling=replace(params, seed=seed_of(params.seed, i)),
            arrival_s=origin.arrival_s,
            queue_timeout_s=state.settings.queue_timeout_s,
            total_timeout_s=state.settings.request_timeout_s,
            prompt_logprobs=prompt_logprobs,
        )
        for index, ((adapter, (prompt, params)), i) in enumerate(choices)
    )
