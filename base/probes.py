"""The probe prompts: two short questions by which anybody can tell whether two places compute alike.

Owned here because both sides ask them: training records what the serving engine answers, in ``lorikeet.json``, and a
server that loads the package asks again. Fixed for ever: another prompt would be another text or another side.

Place in a request's way: none; at start, and when an adapter comes to the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image
from torch import Tensor

from base.processor import ImagePart, Message, Processor, PromptInputs, TextPart

PROBE_TEXT: Final = "Describe this picture."
PROBE_IMAGE_SIDE: Final = 56
"""Pixels: four patches a side, the smallest grid that any checkpoint's processor leaves alone."""


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """What names a probe on both sides."""

    text: str
    picture_side: int | None
    """Pixels of its square picture, a gradient; None without one."""


QUESTIONS: Final = (ProbeQuestion(PROBE_TEXT, None), ProbeQuestion(PROBE_TEXT, PROBE_IMAGE_SIDE))


def probe_prompts(processor: Processor) -> tuple[PromptInputs, ...]:
    """One prompt for each of QUESTIONS, in their order."""
    return tuple(processor.prepare_chat([_message(question)]) for question in QUESTIONS)


def ids_sha256(ids: Sequence[int]) -> str:
    """Hex SHA-256 of the ids in decimal, a space between: equal for equal tokenizers and templates."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def logits_sha256(logits: Tensor) -> str:
    """Hex SHA-256 of [V] logits on the CPU as float32, little-endian: equal only where not a bit differs."""
    return hashlib.sha256(logits.float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def _message(question: ProbeQuestion) -> Message:
    if question.picture_side is None:
        return Message("user", (TextPart(question.text),))
    return Message("user", (_picture(question.picture_side), TextPart(question.text)))


def _picture(side: int) -> ImagePart:
    """A gradient: neither blank nor random, so that every patch differs and every run is the same.

    It brings its own limits, so that a server's pixel budget does not change what is asked.
    """
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    return ImagePart(image, min_pixels=side * side, max_pixels=side * side)
