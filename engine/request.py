"""GenerationRequest: all that the engine needs to know of one wanted completion; frozen from wire to last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from adapters.ref import AdapterRef
from base.prompt import PromptInputs
from engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. A wire request with ``n`` choices becomes n of these."""

    request_id: str
    """Unique among live requests, e.g. ``chatcmpl-…-0``."""
    prompt: PromptInputs
    adapter: AdapterRef
    sampling: SamplingParams
    arrival_s: float
    """``time.monotonic()`` when the wire accepted it."""
    queue_timeout_s: float | None = None
    """Longest wait for the first scheduling; None waits for ever."""
    total_timeout_s: float | None = None
    prompt_logprobs: int | None = None
    """With completions' ``echo`` and ``logprobs``: alternatives to report for each prompt token."""
    is_background: bool = False
    """Runs only while no other sequence runs or waits, brings no adapter to the device, and counts in no metric."""
    on_logits: Callable[[Tensor], None] | None = None
    """For offline judging: called on the engine's thread with the logits [V] float32 that choose each token, before
    anything of sampling touches them. A view of the step's own tensor: copy what is to be kept. No wire sets it."""
