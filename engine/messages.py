"""What crosses between the event loop and the engine: one inbox down, one outbox up. Frozen values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from adapters.ref import AdapterRef
from engine.errors import EngineError
from engine.request import GenerationRequest

FinishReason = Literal["stop", "length", "abort"]


# ---- down: the inbox -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """``reason`` is "stop" when a stop string ended it, which only the reader of the text can see."""

    request_id: str
    reason: FinishReason = "abort"


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Bring an adapter to the device; ``reply`` is called on the engine's thread with the outcome."""

    ref: AdapterRef
    pin: bool
    reply: Callable[[LoadReport | Exception], None]


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Drain and free an adapter's slot and host copy; replies once its last sequence has ended or time is up."""

    ref: AdapterRef
    timeout_s: float
    reply: Callable[[UnloadReport | Exception], None]


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing to do but look: a background load has finished."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the loop after this step; sequences still alive fail with Draining."""


Inbound = Submit | Abort | LoadAdapter | UnloadAdapter | Wake | Stop


@dataclass(frozen=True, slots=True)
class LoadReport:
    ref: AdapterRef
    slot: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class UnloadReport:
    ref: AdapterRef
    freed_device_bytes: int
    freed_host_bytes: int


# ---- up: the outbox --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the model's own distribution: before bias, penalties, masks, temperature and truncation
    (vLLM's default, raw_logprobs). A probability of 0 is reported as -9999."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    image_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent waiting for a place, for the adapter, in prefill and in decode."""

    queue_s: float
    swap_s: float
    prefill_s: float
    decode_s: float
    num_preemptions: int = 0
    """How often it gave its place back and began again; the seconds hold that too."""


@dataclass(frozen=True, slots=True)
class Started:
    """It left the queue: its first chunk is in this step."""

    request_id: str
    swap_s: float = 0.0
    """Of the wait, how much was for its adapter."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the cache."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one sequence; ``prompt_logprobs`` comes once, before or with the first of them."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    request_id: str
    reason: FinishReason
    stop_token_id: int | None
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    request_id: str
    error: EngineError


Outbound = Started | Tokens | Finished | Failed
