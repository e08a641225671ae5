"""Probe: proof that a newly loaded adapter acts, and acts as when it was made, before any request is routed to it.

The base and the adapter answer one fixed prompt, each alone; the adapter must change the logits and keep them finite.
If its package tells what the fixed prompts were answered when it was made, they are asked again, each alone, and
compared. What a package says never adds a prompt: two are all there are.
"""

from __future__ import annotations

import logging
from collections.abc import Generator

import torch
from torch import Tensor

from adapters.errors import AdapterRejected, InsufficientMemory, RejectReason
from adapters.profile import ProcessorFacts, Proof, RecordedProbe
from adapters.ref import BASE, AdapterRef
from base.model import BaseModel
from base.probes import QUESTIONS, ProbeQuestion, probe_prompts
from base.processor import Processor
from base.prompt import PromptInputs
from engine.exhaustion import is_out_of_memory
from engine.replay import Replay, check_ids, compare
from engine.request import GenerationRequest
from engine.runner import Runner
from engine.sampler import SamplerState
from engine.sampling import SamplingParams
from engine.sequence import BASE_SLOT, Sequence
from engine.step import Chunk, ImageJob, StepPlan
from engine.vision_cache import VisionCache

logger = logging.getLogger("lorikeet.engine")


class Probe:
    """Owns KV blocks of its own, so that it never competes with requests."""

    def __init__(
        self, base: BaseModel, runner: Runner, vision_cache: VisionCache, first_block: int, block_size: int
    ) -> None:
        self._base = base
        self._runner = runner
        self._vision_cache = vision_cache
        self._prompts = dict(zip(QUESTIONS, probe_prompts(base.processor), strict=True))
        self._text = next(prompt for prompt in self._prompts.values() if not prompt.images)
        self._picture = next(prompt for prompt in self._prompts.values() if prompt.images)
        self._base_answers: dict[ProbeQuestion, Tensor] = {}
        self._base_logits: dict[int, Tensor] = {}
        """The base's, [T, V], by the prompt's identity, by passes of the adapters' shape: asked once, for the base does
        not change. Some 25 MB each for a vocabulary of 150,000."""
        self._blocks = list(range(first_block, first_block + probe_blocks(base, block_size)))

    def check(self, ref: AdapterRef, slot: int, proof: Proof | None = None) -> Replay | None:
        """What became of the package's own probes; None where it has none that are known here.

        A composition may have no effect: its weights are the client's, and may be tiny or cancel out.

        Raises AdapterRejected (``non_finite``, ``no_effect``, ``probe_failed``, ``probe_mismatch``, ``bad_config``).
        """
        passes = self.passes(ref, slot, proof)
        while True:
            try:
                next(passes)
            except StopIteration as end:
                replay: Replay | None = end.value
                return replay

    def passes(
        self, ref: AdapterRef, slot: int, proof: Proof | None = None
    ) -> Generator[None, None, Replay | None]:
        """As ``check``, and stops after each pass through the model but the last: others may step in between."""
        yield from self._check_effect(ref, slot)
        if proof is None:
            return None
        yield
        return (yield from self._replay(ref, slot, proof))

    def _check_effect(self, ref: AdapterRef, slot: int) -> Generator[None, None, None]:
        prompt = self._picture if ref.vision_digest else self._text
        if id(prompt) not in self._base_logits:
            self._base_logits[id(prompt)] = self._every_row(prompt, BASE, BASE_SLOT).clone()
            yield
        logits, base_logits = self._every_row(prompt, ref, slot), self._base_logits[id(prompt)]
        if not bool(torch.isfinite(logits).all()):
            raise AdapterRejected(RejectReason.NON_FINITE, f"adapter {ref} gives NaN or infinite logits")
        if not ref.is_composed and torch.equal(logits, base_logits):
            raise AdapterRejected(RejectReason.NO_EFFECT, f"adapter {ref} leaves the base's logits unchanged")

    def _every_row(self, prompt: PromptInputs, ref: AdapterRef, slot: int) -> Tensor:
        """[T, V]"""
        (logits,) = self._run(ref, (self._chunk(prompt, ref, slot, self._blocks, _EVERY_ROW),))
        return logits

    def _replay(self, ref: AdapterRef, slot: int, proof: Proof) -> Generator[None, None, Replay | None]:
        _note_pixels(ref, proof.processor, self._base.processor)
        replay: Replay | None = None
        for question, prompt in self._prompts.items():
            recorded = _recorded(proof, question)
            if recorded is None:
                continue
            check_ids(ref, recorded, prompt, proof.processor, self._base.processor)
            if question not in self._base_answers:
                self._base_answers[question] = self._answer(prompt, BASE, BASE_SLOT)
                yield
            logits = self._answer(prompt, ref, slot)
            one = compare(ref, recorded, logits, self._base_answers[question])
            replay = one if replay is None else replay.joined(one)
            yield
        return replay

    def _answer(self, prompt: PromptInputs, ref: AdapterRef, slot: int) -> Tensor:
        """[V] float32 on the CPU: the last row's logits, as a request that is alone in its step gets them."""
        (logits,) = self._run(ref, (self._chunk(prompt, ref, slot, self._blocks, _LAST_ROW),))
        return logits[-1].cpu()

    def warm_up(self) -> None:
        """The first pass through every kernel that a step uses, before anyone waits for it; its logits are kept."""
        chunks = (self._chunk(self._picture, BASE, BASE_SLOT, self._blocks, _EVERY_ROW),)
        (logits,) = self._runner.run(StepPlan(chunks, _image_jobs(chunks))).split()
        self._base_logits[id(self._picture)] = logits.clone()

    def _run(self, ref: AdapterRef, chunks: tuple[Chunk, ...]) -> tuple[Tensor, ...]:
        """[n, V] logits of each chunk."""
        plan = StepPlan(chunks, _image_jobs(chunks))
        keys = [job.key for job in plan.image_jobs]
        for key in keys:
            self._vision_cache.pin(key)
        try:
            return self._runner.run(plan).split()
        except Exception as error:
            if is_out_of_memory(error):
                self._runner.free_memory()
                raise InsufficientMemory(f"no memory to prove adapter {ref}; try again later") from error
            # an adapter that makes the model throw is the adapter's fault
            raise AdapterRejected(
                RejectReason.PROBE_FAILED, f"adapter {ref} makes the model fail ({type(error).__name__})"
            ) from error
        finally:
            for key in keys:
                self._vision_cache.unpin(key)

    def _chunk(
        self, prompt: PromptInputs, ref: AdapterRef, slot: int, blocks: list[int], rows: _Rows
    ) -> Chunk:
        params, prompt_logprobs = rows
        request = GenerationRequest(
            f"probe-{ref}", prompt, ref, params, arrival_s=0.0, prompt_logprobs=prompt_logprobs
        )
        sampler = SamplerState(params, prompt.ids, (), self._base.spec.vocab_size)
        sequence = Sequence(request, sampler, slot=slot, blocks=blocks)
        return Chunk(sequence, 0, len(prompt.ids))


_Rows = tuple[SamplingParams, int | None]
_EVERY_ROW: _Rows = (SamplingParams(max_tokens=0, temperature=0.0), 0)
_LAST_ROW: _Rows = (SamplingParams(max_tokens=1, temperature=0.0), None)


def _image_jobs(chunks: tuple[Chunk, ...]) -> tuple[ImageJob, ...]:
    return tuple(
        ImageJob(c.sequence.image_key(image), image, _vision_slot(c.sequence))
        for c in chunks
        for image in c.images()
    )


def _vision_slot(sequence: Sequence) -> int:
    """As the scheduler has it: adapters without vision weights share the base's embeddings."""
    return sequence.slot if sequence.adapter.vision_digest else BASE_SLOT


def _recorded(proof: Proof, question: ProbeQuestion) -> RecordedProbe | None:
    asked = (question.text, question.picture_side)
    return next((probe for probe in proof.probes if (probe.text, probe.picture_side) == asked), None)


def _note_pixels(ref: AdapterRef, was: ProcessorFacts, processor: Processor) -> None:
    """Another pixel budget is the operator's to choose, and worth knowing: the adapter never saw such sizes."""
    ours = (processor.images.min_pixels, processor.images.max_pixels)
    theirs = (was.min_pixels, was.max_pixels)
    if any(their is not None and their != our for their, our in zip(theirs, ours, strict=True)):
        logger.warning(
            "adapter.pixels_differ ref=%s trained_min=%s trained_max=%s min=%d max=%d", ref, *theirs, *ours
        )


def probe_blocks(base: BaseModel, block_size: int) -> int:
    """KV blocks that the probe needs beside the requests': its longest prompt's."""
    num_tokens = max(len(prompt.ids) for prompt in probe_prompts(base.processor))
    return -(-num_tokens // block_size)
