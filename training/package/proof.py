"""Probes recorded, and the trainer held to them: served logits are the trainer's, or it is said how far they are.

Owns: asking the serving side (a Generator that somebody gives) and comparing. The prompts are ``base.probes``'s, what
is kept of the answers ``adapters.profile``'s. Place in a training run: after training (the trainer's logits against the
served ones), and before the package is written (what it tells the server).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.profile import TOP, RecordedProbe
from base.probes import QUESTIONS, ids_sha256, logits_sha256, probe_prompts
from base.processor import Processor, PromptInputs
from training.data.faults import Origin
from training.data.labels import IGNORED
from training.generation import Generator
from training.model.batch import Batch
from training.model.model import AdaptedBase


def record_probes(generator: Generator, processor: Processor, adapter: Path) -> tuple[RecordedProbe, ...]:
    """What the serving engine answers to the probe prompts, with the adapter and without. Raises AdapterError.

    ``generator`` must be over the serving base: the same fingerprint that ``PackageFacts.base`` tells.
    """
    return tuple(
        _record(question.text, question.picture_side, prompt, generator, adapter)
        for question, prompt in zip(QUESTIONS, probe_prompts(processor), strict=True)
    )


def _record(
    text: str, side: int | None, prompt: PromptInputs, generator: Generator, adapter: Path
) -> RecordedProbe:
    logits = generator.last_logits(prompt, adapter)
    base_logits = generator.last_logits(prompt, None)
    return RecordedProbe(
        text, side, ids_sha256(prompt.ids), _top(logits), _top(base_logits), logits_sha256(logits)
    )


def _top(logits: Tensor) -> tuple[tuple[int, float], ...]:
    values, ids = logits.float().topk(min(TOP, logits.numel()))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the trainer's logits are from the served ones, over the probe prompts."""

    max_difference: float
    is_exact: bool
    spread: float
    """Standard deviation of the served logits: what a difference is to be measured by."""


def prove(
    reference: Callable[[PromptInputs], Tensor], generator: Generator, processor: Processor, adapter: Path
) -> Agreement:
    """Compare ``reference`` (a prompt's last logits [V], by the trainer or by stock PEFT) with the served ones.

    ``reference`` is asked for each prompt before the engine is: it may need the base that the generator then takes.
    Raises AdapterError.
    """
    prompts = probe_prompts(processor)
    expected = [reference(prompt).float().cpu() for prompt in prompts]
    return agreement(expected, generator, processor, adapter)


def agreement(
    expected: Sequence[Tensor], generator: Generator, processor: Processor, adapter: Path
) -> Agreement:
    """As ``prove``, with the reference's logits [V] of ``probe_prompts`` taken before."""
    served = [generator.last_logits(prompt, adapter) for prompt in probe_prompts(processor)]
    pairs = list(zip(expected, served, strict=True))
    return Agreement(
        max_difference=max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
        is_exact=all(torch.equal(ours, theirs) for ours, theirs in pairs),
        spread=min(float(theirs.std()) for _, theirs in pairs),
    )


def trainer_logits(model: AdaptedBase) -> Callable[[PromptInputs], Tensor]:
    """What ``prove`` and ``agreement`` take as the trainer's side: a prompt's last logits, [V] float32 on the CPU."""
    return lambda prompt: model.last_logits(_batch(prompt))[0].float().cpu()


def _batch(prompt: PromptInputs) -> Batch:
    """One prompt alone, nothing to learn in it."""
    ids = torch.tensor(prompt.ids)
    pixels = [image.pixels for image in prompt.images]
    return Batch(
        ids=ids,
        labels=torch.full_like(ids, IGNORED),
        positions=prompt.positions,
        starts=(0, len(prompt.ids)),
        pixels=torch.cat(pixels) if pixels else torch.empty(0, 0),
        grids=tuple(image.grid for image in prompt.images),
        digests=tuple(image.digest for image in prompt.images),
        origins=(Origin("probe", 1),),
    )
