"""ChatRequest: the body of POST /v1/chat/completions. Place in a request's way: step 1."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from server.errors import invalid_request
from server.schemas.base import INT64_MAX, MAX_FAN_OUT, MAX_TOP_LOGPROBS, AskedAdapter, GenerationFields
from server.schemas.messages import Messages
from server.schemas.tools import NamedChoice, ToolChoice, Tools


class ChatRequest(GenerationFields):
    messages: Messages
    adapters: Annotated[list[AskedAdapter], Field(min_length=1, max_length=MAX_FAN_OUT)] | None = None
    """Each of them answers, as a choice of its own."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    """vLLM's; false leaves the assistant's turn unopened."""
    continue_final_message: bool = False
    """vLLM's; the last message is left open for the model to go on with. Needs ``add_generation_prompt: false``."""

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise invalid_request(
                "`max_tokens` and `max_completion_tokens` mean the same: send one of them",
                "max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise invalid_request("`top_logprobs` needs `logprobs: true`", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid_request(
                "`continue_final_message` needs `add_generation_prompt: false`", "continue_final_message"
            )
        if self.n * len(self.adapters or ()) > MAX_FAN_OUT:
            raise invalid_request(
                f"{len(self.adapters or ())} adapters with n={self.n} are more than {MAX_FAN_OUT} answers; "
                "name fewer or lower `n`",
                "adapters",
            )
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise invalid_request("two tools have the same name", "tools")
        if self.tool_choice in (None, "none", "auto"):
            return
        if not names:
            raise invalid_request("`tool_choice` needs `tools`", "tool_choice")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise invalid_request("`tool_choice` names a function that is not among `tools`", "tool_choice")
        if self.response_format is not None and self.response_format.type != "text":
            raise invalid_request(
                "a forced tool call and `response_format` exclude each other", "tool_choice"
            )

    @property
    def fan_out(self) -> list[AskedAdapter] | None:
        return self.adapters

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token; None reports nothing."""
        return self.top_logprobs if self.logprobs else None
