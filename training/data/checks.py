"""Checks of one Conversation against one base: its pictures, its length, its words; before any model is loaded.

Owns: what a row must satisfy besides its format. Does not know: other rows, files.
Place in a training run: under the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from base.processor import Processor
from training.data.faults import Complaint, FaultKind, Found, RowRejected, shown
from training.data.formats.conversation import ASSISTANT, Conversation, Turn
from training.data.formats.pictures import PictureRef
from training.data.labels import Labeller

_BOX: Final = re.compile(
    r'"bbox_2d"\s*:\s*\[\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\]'
)
"""As Qwen2.5-VL writes boxes: pixels of the picture, left, top, right, bottom."""
_REMEMBERED_PICTURES: Final = 100_000


@dataclass(frozen=True, slots=True)
class RowSize:
    """Tokens of one row's longest example."""

    num_text_tokens: int
    num_image_tokens: int
    num_labels: int
    """Of all its examples."""
    num_examples: int

    @property
    def num_tokens(self) -> int:
        return self.num_text_tokens + self.num_image_tokens


class RowCheck:
    """Judges rows one by one; remembers pictures that it has opened."""

    def __init__(self, processor: Processor, max_length: int | None = None) -> None:
        """``max_length`` in tokens, pictures included; None for no limit."""
        self._processor = processor
        self._labeller = Labeller(processor)
        self._max_length = max_length
        self._added = _added_tokens(processor)
        self._picture = lru_cache(_REMEMBERED_PICTURES)(self._look)

    def complaints(self, conversation: Conversation) -> tuple[list[Complaint], RowSize | None]:
        """Everything wrong with it; and its size, unless it cannot be told."""
        found = [*self._of_words(conversation)]
        looks = [self._picture(picture) for picture in conversation.pictures]
        for number, look in enumerate(looks):
            if isinstance(look, Complaint):
                found.append(_placed(look, number))
        sizes = [look for look in looks if isinstance(look, PictureLook)]
        if len(sizes) < len(looks):
            return found, None
        found += _of_boxes(conversation, sizes)
        try:
            size = self._size(conversation, sizes)
        except RowRejected as rejected:
            return [*found, rejected.complaint], None
        if self._max_length is not None and size.num_tokens > self._max_length:
            found.append(_too_long(size, self._max_length))
        return found, size

    def _size(self, conversation: Conversation, looks: list[PictureLook]) -> RowSize:
        outlines = self._labeller.outlines(conversation)
        image_tokens = [
            sum(look.num_tokens for look in looks[: outline.num_pictures]) for outline in outlines
        ]
        text_tokens = [len(outline.ids) - outline.num_pictures for outline in outlines]
        longest = max(range(len(outlines)), key=lambda i: text_tokens[i] + image_tokens[i])
        num_labels = sum(sum(outline.is_label) for outline in outlines)
        return RowSize(text_tokens[longest], image_tokens[longest], num_labels, len(outlines))

    def _look(self, picture: PictureRef) -> PictureLook | Complaint:
        """Decodes it once, so that a file cut short is found now."""
        try:
            picture.open()
            width, height = picture.size()
            resized = self._processor.images.resized(width, height, *picture.limits)
            return PictureLook(
                max(width, resized[0]), max(height, resized[1]), self._labeller.num_image_tokens(picture)
            )
        except RowRejected as rejected:
            return rejected.complaint

    def _of_words(self, conversation: Conversation) -> Iterator[Complaint]:
        for number, turn in enumerate(conversation.turns):
            match = self._added.search(turn.text)
            if match:
                yield Complaint(
                    FaultKind.RESERVED_TOKEN, _name(number, turn), shown(match.group()),
                    "text without the base's own marks",
                    "remove it: in text it never becomes the token, and the chat template writes the marks itself",
                )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PictureLook:
    """A picture that can be used. Width and height are the larger of its own and of what the base sees."""

    width: int
    height: int
    num_tokens: int


def _name(number: int, turn: Turn) -> str:
    return f"turn {number} ({turn.role})"


def _placed(complaint: Complaint, number: int) -> Complaint:
    return Complaint(complaint.kind, f"images[{number}]", complaint.value, complaint.expected, complaint.fix)


def _too_long(size: RowSize, max_length: int) -> Complaint:
    fix = "shorten the text, split the row, or raise max_length"
    if size.num_image_tokens > size.num_text_tokens:
        fix = "lower the pixel budget, give fewer pictures, or raise max_length"
    value = f"{size.num_tokens} tokens: {size.num_text_tokens} text + {size.num_image_tokens} image"
    return Complaint(FaultKind.TOO_LONG, "", value, f"at most {max_length} tokens; nothing is cut", fix)


def _of_boxes(conversation: Conversation, looks: list[PictureLook]) -> Iterator[Complaint]:
    """A box must lie in a picture: in the largest, where there are several."""
    if not looks:
        return
    width, height = max(look.width for look in looks), max(look.height for look in looks)
    for number, turn in enumerate(conversation.turns):
        for match in _BOX.finditer(turn.text) if turn.role == ASSISTANT else ():
            try:
                left, top, right, bottom = (float(edge) for edge in match.groups())
            except ValueError:
                left = right = top = bottom = -1.0
            if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                yield Complaint(
                    FaultKind.BOX_OUT_OF_RANGE, _name(number, turn), shown(Found(match.group())),
                    f"left < right <= {width} and top < bottom <= {height}, in pixels",
                    "scale boxes to the picture's pixels: left, top, right, bottom",
                )  # fmt: skip


def _added_tokens(processor: Processor) -> re.Pattern[str]:
    """Every mark of the base that text may not hold. All begin alike in practice, which makes the search quick."""
    added = sorted(
        (str(token.content) for token in processor.tokenizer.get_added_tokens_decoder().values()),
        key=len,
        reverse=True,
    )
    first = {text[0] for text in added}
    ahead = f"(?=[{re.escape(''.join(sorted(first)))}])" if first else ""
    return re.compile(ahead + f"(?:{'|'.join(map(re.escape, added))})" if added else "(?!)")
