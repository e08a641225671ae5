"""Labeller: a Conversation to ids and labels, built from the server's own prompts so that it cannot differ from them.

Each trained answer is written behind the very ids that the server would send for the messages before it, as the model
would have generated it: the answer's text, then the end token. Answers share one example as long as each next prompt
begins with what is there already; where a template rewrites what was said (or text merges across a seam), a new
example begins. So training ids up to an answer are the server's prompt ids, by construction, for any template.

Labels stand on answers and end tokens alone: never on a picture, never on a prompt. ``labels[i]`` is ``ids[i]`` or
IGNORED; whoever computes the loss shifts. Does not know: formats, batches, models.
Place in a training run: under the report (lengths) and under the collator (tensors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from base.errors import PromptError
from base.images import PreparedImage
from base.processor import Message, Processor, PromptImage, TextPart
from training.data.faults import FaultKind, Found, RowRejected
from training.data.formats.conversation import Conversation
from training.data.formats.pictures import PictureRef

IGNORED: Final = -100
"""What torch's cross entropy passes over."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One example before its pictures are opened: each is still one token."""

    ids: tuple[int, ...]
    is_label: tuple[bool, ...]
    """For each id."""
    num_pictures: int
    """The conversation's first so many."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence to train on. T tokens."""

    ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, IGNORED where nothing is learnt
    positions: Tensor  # [3, T] int64
    images: tuple[PromptImage, ...]
    """In order; ``offset`` counts from the beginning of ``ids``."""

    @property
    def num_labels(self) -> int:
        return int((self.labels != IGNORED).sum())


class Labeller:
    """For one base's processor. Immutable: any number of threads may use it."""

    def __init__(self, processor: Processor) -> None:
        """Raises ValueError for a template that does not end an answer with an end token of the model."""
        self._processor = processor
        self.end_token_id: Final = _end_token_id(processor)

    def outlines(self, conversation: Conversation) -> tuple[Outline, ...]:
        """Its examples, most often one. Raises RowRejected."""
        messages = conversation.blank_messages()
        try:
            answers = [
                self._answered(conversation, messages, i)
                for i, turn in enumerate(conversation.turns)
                if turn.is_trained
            ]
        except PromptError as error:
            raise RowRejected(
                FaultKind.BAD_VALUE,
                "",
                Found(str(error)),
                "messages that the chat template takes",
                "correct the row",
            ) from error
        outlines = _joined(answers)
        if not outlines:
            raise RowRejected(
                FaultKind.NO_LABEL, "", Found("a row without any label"), "at least one answer to train on",
                "set loss to true for one answer, or remove the row",
            )  # fmt: skip
        return outlines

    def examples(self, conversation: Conversation) -> tuple[Example, ...]:
        """Its examples with pictures as patches. Raises RowRejected."""
        outlines = self.outlines(conversation)
        opened = [picture.open() for picture in conversation.pictures[: outlines[-1].num_pictures]]
        try:
            prepared = [self._processor.images.prepare(part) for part in opened]
        except PromptError as error:
            raise RowRejected(
                FaultKind.IMAGE_TOO_EXTREME,
                "images",
                Found(str(error)),
                "a picture to be cut in patches",
                "crop or pad it",
            ) from error
        return tuple(self._example(outline, prepared[: outline.num_pictures]) for outline in outlines)

    def num_image_tokens(self, picture: PictureRef) -> int:
        """How many tokens a picture will take, from its header alone. Raises RowRejected."""
        width, height = self._processor.images.resized(*picture.size(), *picture.limits)
        return (width // self._processor.images.factor) * (height // self._processor.images.factor)

    def _example(self, outline: Outline, prepared: Sequence[PreparedImage]) -> Example:
        inputs = self._processor.assemble(outline.ids, prepared)
        sizes = iter(image.num_tokens for image in inputs.images)
        labels: list[int] = []
        for token_id, is_label in zip(outline.ids, outline.is_label, strict=True):
            is_picture = token_id == self._processor.image_token_id
            labels += [IGNORED] * next(sizes) if is_picture else [token_id if is_label else IGNORED]
        return Example(torch.tensor(inputs.ids), torch.tensor(labels), inputs.positions, inputs.images)

    def _answered(self, conversation: Conversation, messages: Sequence[Message], index: int) -> Outline:
        """The server's prompt for the messages before ``index``, and the answer."""
        prompt = self._processor.chat_ids(messages[:index], tools=conversation.tools)
        turn = conversation.turns[index]
        answer = (
            self._rendered_answer(conversation, messages, index, prompt)
            if turn.tool_calls
            else [*self._processor.encode(turn.text), self.end_token_id]
        )
        ids = (*prompt, *answer)
        num_pictures = sum(len(before.pictures) for before in conversation.turns[:index])
        return Outline(ids, (False,) * len(prompt) + (True,) * len(answer), num_pictures)

    def _rendered_answer(
        self, conversation: Conversation, messages: Sequence[Message], index: int, prompt: Sequence[int]
    ) -> list[int]:
        """An answer with tool calls, as the template writes them: their marks are tokens that text cannot spell."""
        whole = self._processor.chat_ids(
            messages[: index + 1], tools=conversation.tools, add_generation_prompt=False
        )
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != list(prompt) or self.end_token_id not in answer:
            raise RowRejected(
                FaultKind.BAD_VALUE, f"turn {index}", Found("tool calls that do not continue the server's prompt"),
                "a base whose chat template knows tool calls", "remove the row, or train on another base",
            )  # fmt: skip
        return answer[: answer.index(self.end_token_id) + 1]


def _joined(answers: Sequence[Outline]) -> tuple[Outline, ...]:
    """Neighbours as one wherever the later begins with all of the earlier."""
    joined: list[Outline] = []
    for later in answers:
        earlier = joined[-1] if joined else None
        if earlier is not None and later.ids[: len(earlier.ids)] == earlier.ids:
            flags = earlier.is_label + later.is_label[len(earlier.ids) :]
            joined[-1] = Outline(later.ids, flags, later.num_pictures)
        else:
            joined.append(later)
    return tuple(joined)


def _end_token_id(processor: Processor) -> int:
    """The token that the template writes behind an answer, and at which generation stops."""
    question = [Message("user", (TextPart("a"),))]
    prompt = processor.chat_ids(question)
    answered = [*question, Message("assistant", (TextPart("b"),))]
    rest = processor.chat_ids(answered, add_generation_prompt=False)[len(prompt) :]
    ends = [token_id for token_id in rest if token_id in processor.eos_token_ids]
    if not ends:
        raise ValueError(
            "the base's chat template ends an answer with no end token of the model: it cannot be trained"
        )
    return ends[0]
