"""StepPlan: what one step will compute, decided by the scheduler, carried out by the runner. Frozen; no tensors."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from base.prompt import PromptImage
from engine.sequence import Sequence
from engine.vision_cache import ImageKey


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, start + num_tokens)`` of one sequence."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 and self.start >= self.sequence.num_prompt_tokens

    @property
    def yields_token(self) -> bool:
        """Its last row's logits choose the sequence's next token."""
        return self.end >= self.sequence.num_tokens and self.sequence.request.sampling.max_tokens > 0

    @property
    def num_unknown(self) -> int:
        """Its sequence's tokens that the host does not know yet: 1 where the step before it was not read."""
        return max(0, self.end - self.sequence.num_tokens)

    @property
    def needs_host(self) -> bool:
        """Must the host see its token or its logits before the step after it can be started?"""
        return self.sequence.sampler.needs_host or self.sequence.request.on_logits is not None

    @property
    def wants_prompt_logits(self) -> bool:
        """Some of its rows predict a prompt token whose log-probability was asked for."""
        is_wanted = (
            self.sequence.request.prompt_logprobs is not None and not self.sequence.has_prompt_logprobs
        )
        return is_wanted and self.start < self.sequence.num_prompt_tokens

    def images(self) -> list[PromptImage]:
        """Images with at least one token inside the chunk."""
        return self.sequence.images_between(self.start, self.end)

    def images_met(self) -> list[PromptImage]:
        """Images that no chunk of the sequence met before: those that begin in it, and for its first chunk also those
        that lie in the cached prefix.
        """
        begin = 0 if self.sequence.started_s is None else self.start
        images = self.sequence.images_between(begin, self.end)
        return [image for image in images if image.offset >= begin]


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image to encode in this step, with the slot whose vision weights apply."""

    key: ImageKey
    image: PromptImage
    slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Decodes first, then prefill chunks."""

    chunks: tuple[Chunk, ...]
    image_jobs: tuple[ImageJob, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    def only(self, chunks: Seq[Chunk]) -> StepPlan:
        """The part of the plan that serves ``chunks``: for retrying after a step that threw."""
        keys = {c.sequence.image_key(image) for c in chunks for image in c.images()}
        return StepPlan(tuple(chunks), tuple(job for job in self.image_jobs if job.key in keys))
