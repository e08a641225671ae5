"""CompletionRequest: the body of POST /v1/completions. Place in a request's way: step 1."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from server.errors import invalid_request
from server.schemas.base import INT64_MAX, MAX_TOP_LOGPROBS, GenerationFields

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16
"""OpenAI's and vLLM's, for completions only."""

TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, str):
        return "<texts>"
    return "<lists>" if isinstance(first, list) else "<ids>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[Ids, Tag("<ids>")]
    | Annotated[list[Ids], Field(max_length=MAX_PROMPTS), Tag("<lists>")],
    Discriminator(_prompt_kind),
]


class CompletionRequest(GenerationFields):
    prompt: Prompt
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise invalid_request(
                "`max_tokens: 0` needs `echo: true`: else there is nothing to answer", "max_tokens"
            )
        if len(self.prompts) * self.n > MAX_PROMPTS:
            raise invalid_request(f"prompts times `n` is over {MAX_PROMPTS}: send fewer at once", "prompt")
        return self

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """One entry for each prompt: its text or its ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        ids = [item for item in self.prompt if isinstance(item, int)]
        return (ids,) if ids else tuple(item for item in self.prompt if not isinstance(item, int))

    @property
    def wanted_tokens(self) -> int:
        """At least 1: with ``max_tokens: 0`` one token is made, and left out of the answer."""
        return max(1, DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens)

    @property
    def is_echo_only(self) -> bool:
        return self.max_tokens == 0
