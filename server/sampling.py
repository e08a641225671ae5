"""The wire's sampling fields -> SamplingParams, for the context that a prompt leaves.

Pure. Place in a request's way: step 3.
"""

from __future__ import annotations

import json

from engine.sampling import GrammarSpec, SamplingParams
from server.errors import WireError, invalid_request
from server.schemas import GenerationFields, ResponseFormat
from server.schemas.base import INT64_MAX

SMALLEST_TOP_P = 1e-6
"""OpenAI takes ``top_p: 0`` for the likeliest token alone; a nucleus has to hold something."""
MAX_SCHEMA_CHARS = 128 * 1024


def sampling_params(
    request: GenerationFields,
    *,
    max_tokens: int,
    vocab_size: int,
    logprobs: int | None,
    grammar: GrammarSpec | None,
) -> SamplingParams:
    """What all choices of a request share; ``seeded`` tells them apart. Raises WireError 400."""
    if request.min_tokens > max_tokens:
        raise invalid_request(
            f"`min_tokens` is over the {max_tokens} tokens that may come at most", "min_tokens"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=max(request.top_p, SMALLEST_TOP_P),
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=request.seed,
        logit_bias=biases(request.logit_bias, vocab_size),
        stop=request.stops,
        stop_token_ids=_stop_ids(request.stop_token_ids, vocab_size),
        ignore_eos=request.ignore_eos,
        include_stop_str_in_output=request.include_stop_str_in_output,
        logprobs=logprobs,
        grammar=grammar,
    )


def seed_of(seed: int | None, index: int) -> int | None:
    """Choice ``index`` draws with ``seed + index``, wrapped to 64 bits: choices differ, and each can be redone."""
    if seed is None:
        return None
    return (seed + index + INT64_MAX + 1) % (2 * (INT64_MAX + 1)) - INT64_MAX - 1


def biases(logit_bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Token ids come as JSON keys, so as text. Raises WireError 400 for what is no id of this base."""
    return tuple(sorted((_token_id(key, vocab_size), bias) for key, bias in logit_bias.items()))


def _token_id(key: str, vocab_size: int) -> int:
    if key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size:
        return int(key)
    raise invalid_request(f"`logit_bias` takes token ids from 0 to {vocab_size - 1} as keys", "logit_bias")


def _stop_ids(token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    """Raises WireError 400 for what is no id of this base."""
    if any(token_id >= vocab_size for token_id in token_ids):
        raise invalid_request(
            f"`stop_token_ids` takes token ids from 0 to {vocab_size - 1}", "stop_token_ids"
        )
    return tuple(token_ids)


def max_tokens_for(num_prompt_tokens: int, wanted: int | None, max_model_len: int, param: str) -> int:
    """``wanted``, or all that the context leaves. Raises WireError 400 context_length_exceeded with the numbers."""
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise WireError(
            400,
            "context_length_exceeded",
            f"this model's context is {max_model_len} tokens; the prompt has {num_prompt_tokens}: shorten it",
            param=param,
        )
    if wanted is not None and wanted > room:
        raise WireError(
            400,
            "context_length_exceeded",
            f"this model's context is {max_model_len} tokens; {num_prompt_tokens + wanted} were asked for "
            f"({num_prompt_tokens} in the prompt, {wanted} for the answer): ask for {room} at most",
            param=param,
        )
    return room if wanted is None else wanted


def grammar_of(response_format: ResponseFormat | None) -> GrammarSpec | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is None:
        return GrammarSpec("json_object")
    source = json.dumps(response_format.json_schema.schema_, ensure_ascii=False)
    if len(source) > MAX_SCHEMA_CHARS:
        raise invalid_request(f"the JSON schema is over {MAX_SCHEMA_CHARS:,} characters", "response_format")
    return GrammarSpec("json_schema", source)
