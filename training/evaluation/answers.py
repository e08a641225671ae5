"""Respondent: answers as text, from a Generator, in portions that fit into memory, each answer counted.

Owns: portions, and answers once given: the base does not change, so over mid-training evaluations and a sweep's
experiments each of its answers is generated once; an adapter's are kept as long as one judging lasts.
Does not know: rows, metrics. Place in a training run: between the questions and the Generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

from base.processor import Processor, PromptInputs
from training.evaluation.errors import EvaluationError
from training.generation import Generator

PORTION_BYTES: Final = 256 * 2**20
"""Of pictures' patches held at once; a megapixel takes 24 MiB."""
PORTION_PROMPTS: Final = 64


class Progress(Protocol):
    """Who is told how far judging is: ``begin`` with the number of answers of a phase, ``advance`` at each."""

    def begin(self, phase: str, total: int) -> None: ...

    def advance(self) -> None: ...


class Quiet:
    """Tells nobody."""

    def begin(self, phase: str, total: int) -> None:
        """Nothing."""

    def advance(self) -> None:
        """Nothing."""


class AnswerMemory:
    """What one model has answered, by prompt. To be kept as long as that model is, and no longer."""

    def __init__(self) -> None:
        self._answers: dict[str, str] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> str:
        return self._answers[key]

    def put(self, key: str, answer: str) -> None:
        self._answers[key] = answer


class Respondent:
    """The base, and the base with one adapter, answering. Made for one adapter as it is now."""

    def __init__(
        self,
        generator: Generator,
        processor: Processor,
        adapter: Path,
        *,
        max_tokens: int,
        memory: AnswerMemory | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``memory`` is the base's."""
        self.generator, self.processor, self.adapter = generator, processor, adapter
        self._max_tokens = max_tokens
        self._memories = {False: AnswerMemory() if memory is None else memory, True: AnswerMemory()}
        self._progress: Progress = Quiet() if progress is None else progress

    def answers(
        self,
        phase: str,
        prompts: Iterable[PromptInputs],
        total: int,
        *,
        with_adapter: bool,
        most: int | None = None,
    ) -> list[str]:
        """One for each prompt, in order, of at most ``most`` tokens if that is less than usual. ``prompts`` are taken
        as they are needed, and dropped. Raises AdapterError."""
        self._progress.begin(phase, total)
        max_tokens = self._max_tokens if most is None else min(most, self._max_tokens)
        portions = (self._answer(portion, with_adapter, max_tokens) for portion in _portions(prompts))
        return [answer for portion in portions for answer in portion]

    def _answer(self, prompts: list[PromptInputs], with_adapter: bool, max_tokens: int) -> list[str]:
        memory = self._memories[with_adapter]
        keys = [_key(prompt, max_tokens) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in memory}
        for _ in range(len(prompts) - len(new)):
            self._progress.advance()
        generated = self._generated(list(new.values()), with_adapter, max_tokens)
        for key, answer in zip(new, generated, strict=True):
            memory.put(key, answer)
        return [memory[key] for key in keys]

    def _generated(self, prompts: list[PromptInputs], with_adapter: bool, max_tokens: int) -> list[str]:
        if not prompts:
            return []
        adapter = self.adapter if with_adapter else None
        told = self._progress.advance
        ids = self.generator.generate(prompts, adapter, max_tokens=max_tokens, on_answer=told)
        if len(ids) != len(prompts):
            raise EvaluationError(f"the generator gave {len(ids)} answers to {len(prompts)} prompts")
        return [self.processor.decode(answer) for answer in ids]


def _portions(prompts: Iterable[PromptInputs]) -> Iterator[list[PromptInputs]]:
    portion: list[PromptInputs] = []
    num_bytes = 0
    for prompt in prompts:
        portion.append(prompt)
        num_bytes += sum(image.pixels.nbytes for image in prompt.images)
        if num_bytes >= PORTION_BYTES or len(portion) >= PORTION_PROMPTS:
            yield portion
            portion, num_bytes = [], 0
    if portion:
        yield portion


def _key(prompt: PromptInputs, max_tokens: int) -> str:
    """By ids and pictures: two prompts that share it get the same answer from the same base."""
    content = repr((prompt.ids, [(image.digest, image.offset) for image in prompt.images], max_tokens))
    return hashlib.sha256(content.encode()).hexdigest()
