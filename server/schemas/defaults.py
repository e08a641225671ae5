"""Fields that OpenAI or vLLM knows and this server does not support, with the values at which they change nothing.

Real clients send those values, so they are accepted; any other value is a 400 ``unsupported`` that names the field.
``null`` is always such a value. Owns the table; pure. Place in a request's way: step 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.errors import unsupported

Neutral = tuple[object, ...]

SHARED: Mapping[str, Neutral] = {
    # vLLM: sampling
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "vllm_xargs": ({},),
    # vLLM: prompt and output text
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True, False),  # no base of this family has tokens that a prompt would be given
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "detokenize": (True,),
    # vLLM: structured output by other means than response_format
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    # vLLM: the server's own business
    "priority": (0,),
    "request_id": (),
    "cache_salt": (),
    "kv_transfer_params": ({},),
    # LoRAX: where adapter_id is to be fetched from
    "adapter_source": ("local",),
    "api_token": (),
    "merged_adapters": (),
}

CHAT: Mapping[str, Neutral] = {
    **SHARED,
    # OpenAI
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none", "medium"),
    "verbosity": ("medium",),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),  # without functions, both say the same
    # vLLM
    "echo": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "chat_template_content_format": ("auto",),
    "documents": ([],),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}

COMPLETION: Mapping[str, Neutral] = {
    **SHARED,
    "suffix": ("",),
    "prompt_embeds": (),
}


def take_out_neutral(body: Mapping[str, object], table: Mapping[str, Neutral]) -> dict[str, object]:
    """``body`` without the table's fields. Raises WireError 400 unsupported where one would change the answer."""
    for name in body.keys() & table.keys():
        value = body[name]
        if value is not None and not any(_is_same(value, neutral) for neutral in table[name]):
            raise unsupported(_message(name, table[name]), name)
    return {name: value for name, value in body.items() if name not in table}


def _is_same(value: object, neutral: object) -> bool:
    """JSON's equality: 1 and 1.0 are one number, but true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _message(name: str, neutral: Neutral) -> str:
    accepted = " or ".join(repr(value) if isinstance(value, str) else str(value) for value in neutral)
    values = f"leave it out, or send {accepted}" if accepted else "leave it out"
    return f"this server does not support `{name}`: {values}"
