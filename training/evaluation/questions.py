"""Question: what a held-out row asks, what it wants to hear, and the prompt that the server would make of it.

A row is judged by its last trained answer, with everything before it as the data has it (gold history): one row is one
answer, so rows weigh alike, and a mistake in an early turn does not spoil the later ones. The prompt is the processor's
own for the messages before that answer; the wanted text is decoded from the very ids that training puts labels on, so
the text of tool calls too is compared as the model writes it.

Owns: that choice, the choice of rows, and what is shown in place of a row's pictures. Does not know: models, metrics.
Place in a training run: made once from the held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile, takewhile

from PIL import Image

from base.processor import ImagePart, Processor, PromptInputs
from training.data.faults import Origin
from training.data.formats import Conversation, PictureRef
from training.data.labels import Labeller, Outline
from training.evaluation.errors import EvaluationError

Show = Callable[[PictureRef], ImagePart]
"""What is put before the model for a picture of the row."""
_GREY = (127, 127, 127)


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out row up to the answer that is judged."""

    row: Conversation
    """Cut before that answer."""
    gold: str
    digest: str
    """Of the whole row; what rows are chosen and paired by."""

    @property
    def origin(self) -> Origin:
        return self.row.origin

    @property
    def pictures(self) -> tuple[PictureRef, ...]:
        return self.row.pictures

    @property
    def text(self) -> str:
        """The last thing said to the model, for people."""
        return self.row.turns[-1].text.strip() if self.row.turns else ""

    def prompt(self, processor: Processor, show: Show = PictureRef.open) -> PromptInputs:
        """As the server would make it. Raises RowRejected for a picture that cannot be opened, PromptError."""
        messages = [turn.message(show) for turn in self.row.turns]
        return processor.prepare_chat(messages, tools=self.row.tools)


def questions_of(
    rows: Sequence[Conversation], processor: Processor, most: int | None = None
) -> tuple[Question, ...]:
    """At most so many rows' questions, in the rows' order. Which ones depends on their content alone (least digest), so
    that every run, seed and experiment over the same data is judged on the same rows. Raises EvaluationError."""
    labeller = Labeller(processor)
    digests = [row.digest() for row in rows]
    kept = sorted(range(len(rows)), key=digests.__getitem__)[:most]
    if not kept:
        raise EvaluationError(
            "there are no held-out rows to judge on: give an evaluation file, or hold out a share of the data"
        )
    return tuple(_question(rows[index], digests[index], labeller, processor) for index in sorted(kept))


def _question(row: Conversation, digest: str, labeller: Labeller, processor: Processor) -> Question:
    last = max(index for index, turn in enumerate(row.turns) if turn.is_trained)
    gold = processor.decode(_last_answer(labeller.outlines(row)[-1]))
    return Question(replace(row, turns=row.turns[:last]), gold, digest)


def _last_answer(outline: Outline) -> list[int]:
    """Ids of the last run of labels, without its end token."""
    marked = reversed(list(zip(outline.ids, outline.is_label, strict=True)))
    run = takewhile(lambda pair: pair[1], dropwhile(lambda pair: not pair[1], marked))
    return [token_id for token_id, _ in run][:0:-1]


def blank(picture: PictureRef) -> ImagePart:
    """Plain grey of the picture's size."""
    return ImagePart(Image.new("RGB", picture.size(), _GREY), *picture.limits)
