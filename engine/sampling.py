"""SamplingParams: how one sequence's next token is chosen. Values only; the sampler acts on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

MIN_TEMPERATURE: Final = 1e-5
"""Below it, sampling is greedy: the likeliest token's share is 1 in float64 anyway (vLLM's bound)."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A constraint on the output: ``source`` is a JSON schema, a Lark grammar or a regular expression."""

    kind: Literal["json_schema", "json_object", "lark", "regex"]
    source: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """OpenAI's and vLLM's sampling fields, already validated and in range."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy, and so is anything below MIN_TEMPERATURE."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    """Number of alternatives to report beside the chosen token; None reports nothing."""
    grammar: GrammarSpec | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE
