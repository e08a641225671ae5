"""Probe: proof that a newly loaded adapter acts, before any request is routed to it.

The base and the adapter answer one fixed prompt in one small batch; the adapter must change the logits and keep them
finite, or it is refused.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from adapters.errors import AdapterRejected, RejectReason
from adapters.ref import BASE, AdapterRef
from base.model import BaseModel
from base.prompt import ImagePart, Message, PromptInputs, TextPart
from engine.request import GenerationRequest
from engine.runner import Runner
from engine.sampler import SamplerState
from engine.sampling import SamplingParams
from engine.sequence import BASE_SLOT, Sequence
from engine.step import Chunk, ImageJob, StepPlan
from engine.vision_cache import VisionCache

PROBE_TEXT = "Describe this picture."
PROBE_IMAGE_SIDE = 56
"""Pixels: four patches a side, the smallest grid that any checkpoint's processor leaves alone."""


class Probe:
    """Owns KV blocks of its own, so that it never competes with requests."""

    def __init__(
        self, base: BaseModel, runner: Runner, vision_cache: VisionCache, first_block: int, block_size: int
    ) -> None:
        self._base = base
        self._runner = runner
        self._vision_cache = vision_cache
        self._text = base.processor.prepare_chat([Message("user", (TextPart(PROBE_TEXT),))])
        self._picture = base.processor.prepare_chat([_picture_message()])
        num_blocks = probe_blocks(base, block_size) // 2
        self._blocks = (
            list(range(first_block, first_block + num_blocks)),
            list(range(first_block + num_blocks, first_block + 2 * num_blocks)),
        )

    def check(self, ref: AdapterRef, slot: int) -> None:
        """Raises AdapterRejected (``non_finite``, ``no_effect``, ``probe_failed``)."""
        prompt = self._picture if ref.vision_digest else self._text
        chunks = (
            self._chunk(prompt, BASE, BASE_SLOT, self._blocks[0]),
            self._chunk(prompt, ref, slot, self._blocks[1]),
        )
        try:
            base_logits, logits = self._run(StepPlan(chunks, _image_jobs(chunks)))
        except Exception as error:  # an adapter that makes the model throw is the adapter's fault
            raise AdapterRejected(
                RejectReason.PROBE_FAILED, f"adapter {ref} makes the model fail ({type(error).__name__})"
            ) from error
        if not bool(torch.isfinite(logits).all()):
            raise AdapterRejected(RejectReason.NON_FINITE, f"adapter {ref} gives NaN or infinite logits")
        if torch.equal(logits, base_logits):
            raise AdapterRejected(RejectReason.NO_EFFECT, f"adapter {ref} leaves the base's logits unchanged")

    def warm_up(self) -> None:
        """The first pass through every kernel that a step uses, before anyone waits for it."""
        chunks = (self._chunk(self._picture, BASE, BASE_SLOT, self._blocks[0]),)
        self._runner.run(StepPlan(chunks, _image_jobs(chunks)))

    def _run(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """[n, V] logits of the base and of the adapter for every row of the prompt."""
        keys = [job.key for job in plan.image_jobs]
        for key in keys:
            self._vision_cache.pin(key)
        try:
            base_logits, logits = self._runner.run(plan).split()
        finally:
            for key in keys:
                self._vision_cache.unpin(key)
        return base_logits, logits

    def _chunk(self, prompt: PromptInputs, ref: AdapterRef, slot: int, blocks: list[int]) -> Chunk:
        params = SamplingParams(max_tokens=0, temperature=0.0)
        request = GenerationRequest(f"probe-{ref}", prompt, ref, params, arrival_s=0.0, prompt_logprobs=0)
        sampler = SamplerState(params, prompt.ids, (), self._base.spec.vocab_size)
        sequence = Sequence(request, sampler, slot=slot, blocks=blocks)
        return Chunk(sequence, 0, len(prompt.ids))


def _picture_message() -> Message:
    """A gradient: neither blank nor random, so that every patch differs and every run is the same."""
    side = PROBE_IMAGE_SIDE
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    return Message("user", (ImagePart(image), TextPart(PROBE_TEXT)))


def _image_jobs(chunks: tuple[Chunk, ...]) -> tuple[ImageJob, ...]:
    return tuple(
        ImageJob(c.sequence.image_key(image), image, c.sequence.slot) for c in chunks for image in c.images()
    )


def probe_blocks(base: BaseModel, block_size: int) -> int:
    """KV blocks that the probe needs beside the requests': twice its longest prompt."""
    num_tokens = len(base.processor.prepare_chat([_picture_message()]).ids)
    return 2 * -(-num_tokens // block_size)
