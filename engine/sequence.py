"""Sequence: one request's life inside the engine. Its status, blocks and slot are written by the scheduler alone; its
tokens and times by the engine's commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from adapters.ref import AdapterRef
from base.prompt import PromptImage
from engine.messages import TokenLogprob
from engine.request import GenerationRequest
from engine.sampler import SamplerState
from engine.vision_cache import ImageKey

BASE_SLOT = -1
"""Rows of the base are routed to no slot."""


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class WaitReason(StrEnum):
    """Why a waiting sequence waits."""

    QUEUE = "queue"
    ADAPTER = "adapter"
    BLOCKS = "blocks"


@dataclass(slots=True, eq=False)
class Sequence:
    """Identity is the object; ``request.request_id`` names it to the outside."""

    request: GenerationRequest
    sampler: SamplerState
    status: Status = Status.WAITING
    wait_reason: WaitReason = WaitReason.QUEUE
    slot: int = BASE_SLOT
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    num_cached_tokens: int = 0
    """Of the prompt, those that were found there when it first started."""
    block_keys: list[bytes] = field(default_factory=list)
    """Of its first blocks, as far as anybody asked (``prefix``)."""
    num_kept_blocks: int = 0
    """Of ``blocks``, those that others can find, or have found equal ones of."""
    output_ids: list[int] = field(default_factory=list)
    pinned_images: list[ImageKey] = field(default_factory=list)
    slot_wait_since_s: float | None = None
    started_s: float | None = None
    swap_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of prompt tokens 1.. so far, when they were asked for."""
    has_prompt_logprobs: bool = False
    """They were sent."""
    is_kept_apart: bool = False
    """Nobody else may use what it computes from here on."""
    num_preemptions: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def adapter(self) -> AdapterRef:
        return self.request.adapter

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt.ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output together: the tokens that exist."""
        return len(self.request.prompt.ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """One new token to feed, all before it cached."""
        return self.num_computed > 0 and self.num_uncomputed == 1 and bool(self.output_ids)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens ``[start, end)`` of prompt and output."""
        prompt = self.request.prompt.ids
        ids = list(prompt[start:end])
        if end > len(prompt):
            ids += self.output_ids[max(0, start - len(prompt)) : end - len(prompt)]
        return ids

    def images_between(self, begin: int, end: int) -> list[PromptImage]:
        """Images with at least one token in ``[begin, end)``."""
        images = self.request.prompt.images
        return [image for image in images if image.offset < end and image.offset + image.num_tokens > begin]

    def image_key(self, image: PromptImage) -> ImageKey:
        return ImageKey(image.digest, self.adapter.vision_digest)
