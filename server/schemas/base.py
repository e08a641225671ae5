"""Shapes that every request shares: strictness, tagged unions, and the fields of sampling, streaming and adapters.

Place in a request's way: step 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from server.errors import invalid_request, unsupported

MAX_CHOICES = 8
MAX_FAN_OUT = 16
"""Answers of one request with `adapters`, those of `n` among them."""
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_NAME_CHARS = 256
INT64_MAX = 2**63 - 1


class Wire(BaseModel):
    """Strict: no unknown fields, no numbers in strings, no booleans for numbers, no NaN."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


def kind_of(value: object) -> str | None:
    """Tags a value by its JSON kind, so that a union's error speaks of one branch only."""
    if isinstance(value, str):
        return "<string>"
    if isinstance(value, list):
        return "<array>"
    return "<object>" if isinstance(value, dict | BaseModel) else None


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopText, Tag("<string>")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS), Tag("<array>")],
    Discriminator(kind_of),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
Weight = Annotated[float, Field(ge=-100, le=100)]


class WeightedAdapter(Wire):
    """One of a composition."""

    name: Name
    weight: Weight = 1.0


class ScaledLora(Wire):
    """llama.cpp's: ``id`` is the number that GET /lora-adapters gives, or a name."""

    id: Annotated[int, Field(ge=0, le=INT64_MAX)] | Name
    scale: Weight


AskedAdapter = Annotated[
    Annotated[Name, Tag("<string>")]
    | Annotated[list[WeightedAdapter], Field(min_length=1, max_length=16), Tag("<array>")],
    Discriminator(kind_of),
]
"""One adapter: a name, or several adapters that are to act as one."""


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """Harmless: pads frames against eavesdroppers at OpenAI."""


class JsonSchemaFormat(Wire):
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = None
    """Harmless: the output is always held to the schema."""


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid_request(
                "`json_schema` goes with type json_schema, and with it alone", "response_format.json_schema"
            )
        return self


class GenerationFields(Wire):
    """What chat and completions both take. ``None`` says that the client left it to us."""

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    # ---- which adapter: null counts for `adapter`, so look at model_fields_set
    adapter: AskedAdapter | None = None
    lora_path: Name | None = None
    adapter_id: Name | None = None
    lora: Annotated[list[ScaledLora], Field(max_length=64)] | None = None

    # ---- how the next token is chosen
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None

    # ---- when it ends, and how many there are
    max_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] = 0
    stop: Stop | None = None
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, le=INT64_MAX)]], Field(max_length=MAX_STOP_TOKENS)
    ] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Field(ge=1)] | None = None

    # ---- harmless: accepted, and nothing follows from them
    user: str | None = None
    metadata: dict[str, object] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, object] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise invalid_request("`stream_options` goes with `stream: true` only", "stream_options")
        if self.best_of is not None and self.best_of != self.n:
            raise unsupported(
                "this server returns all that it generates: `best_of` must equal `n`", "best_of"
            )
        return self

    @property
    def fan_out(self) -> list[AskedAdapter] | None:
        """Adapters that are to answer the same request, each for itself; None where one does."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def includes_running_usage(self) -> bool:
        return self.includes_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )
