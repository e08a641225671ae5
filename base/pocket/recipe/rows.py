"""Rows of tokens: conversations that share a beginning (and a picture), laid out as a tree in one row.

Owns: the ChatML layout, mrope positions, which token sees which, and which tokens are answers. Every branch of a row
continues the row's prefix as if it were alone, so one picture is paid for once and asked about many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from base.pocket.recipe.questions import Asked

IGNORED: Final = -100
TEXT: Final = -1  # not a picture token


@dataclass(frozen=True, slots=True)
class Row:
    """One row of L tokens.

    `branch[i]` is 0 for the prefix; `picture[i]` is a picture token's index in its picture, or `TEXT`; `labels[i]` is
    the token wanted after token i, or `IGNORED`; `answers[i]` numbers the answer that label belongs to, or is -1.
    """

    ids: list[int]
    positions: list[tuple[int, int, int]]
    branch: list[int]
    picture: list[int]
    labels: list[int]
    answers: list[int]
    asked: list[Asked]


class RowWriter:
    """Writes one row: a prefix, then branches. `grid` is the picture's (down, across) in merged tokens."""

    def __init__(self, tokenizer: Tokenizer, grid: tuple[int, int] | None) -> None:
        self._encode = _encoder(tokenizer)
        self._grid = grid
        self._row = Row([], [], [], [], [], [], [])
        self._branch = 0
        self._next = 0
        self._prefix_end = 0

    def start(self, system: str, shows_picture: bool) -> None:
        """The prefix: a system message and the opening of the user's, with the picture or without."""
        self._text(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
        if shows_picture:
            self._show()
        self._prefix_end = self._next

    def branch(self, turns: list[Asked], picture_after: bool = False) -> None:
        """One conversation that continues the prefix; `picture_after` shows the picture after its first question."""
        self._branch += 1
        self._next = self._prefix_end
        for index, asked in enumerate(turns):
            self._text(asked.question if index == 0 else f"\n<|im_start|>user\n{asked.question}")
            if picture_after and index == 0:
                self._show()
            self._text("<|im_end|>\n<|im_start|>assistant\n")
            self._answer(asked)

    def finish(self) -> Row:
        """The row; the writer is spent."""
        return self._row

    def _text(self, text: str) -> None:
        for token in self._encode(text):
            self._put(token, (self._next,) * 3, TEXT)
            self._next += 1

    def _show(self) -> None:
        assert self._grid is not None
        down, across = self._grid
        self._text("<|vision_start|>")
        [pad] = self._encode("<|image_pad|>")
        start = self._next
        for index in range(down * across):
            self._put(pad, (start, start + index // across, start + index % across), index)
        self._next = start + max(down, across)
        self._text("<|vision_end|>")

    def _answer(self, asked: Asked) -> None:
        first = len(self._row.ids) - 1
        self._text(f"{asked.answer}<|im_end|>")
        for index in range(first, len(self._row.ids) - 1):
            self._row.labels[index] = self._row.ids[index + 1]
            self._row.answers[index] = len(self._row.asked)
        self._row.asked.append(asked)

    def _put(self, token: int, position: tuple[int, int, int], picture: int) -> None:
        self._row.ids.append(token)
        self._row.positions.append(position)
        self._row.branch.append(self._branch)
        self._row.picture.append(picture)
        self._row.labels.append(IGNORED)
        self._row.answers.append(-1)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded to one length L, and the pictures of the first `pixels.shape[0]` of them, all of one grid."""

    ids: Tensor  # [B, L] int64
    positions: Tensor  # [3, B, L] int64
    sees: Tensor  # [B, 1, L, L] bool
    picture: Tensor  # [B, L] int64, index in its picture or TEXT
    labels: Tensor  # [B, L] int64
    answers: Tensor  # [B, L] int64, the answer's number in `asked`, or -1
    asked: tuple[Asked, ...]
    pixels: Tensor  # [P, N, 1176] float32
    grid: tuple[int, int]  # patches (down, across)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each answer."""
        return tuple(asked.kind for asked in self.asked)


def collate(rows: list[Row], pixels: Tensor, grid: tuple[int, int], multiple: int = 16) -> Batch:
    """Pad `rows` to one length, a multiple of `multiple`."""
    length = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row.asked))
    shifted = [[a + o if a >= 0 else -1 for a in row.answers] for row, o in zip(rows, offsets, strict=False)]
    branch = torch.stack([_padded(row.branch, length, -2) for row in rows])
    return Batch(
        ids=torch.stack([_padded(row.ids, length, 0) for row in rows]),
        positions=torch.stack([_padded_positions(row.positions, length) for row in rows], dim=1),
        sees=_visibility(branch),
        picture=torch.stack([_padded(row.picture, length, TEXT) for row in rows]),
        labels=torch.stack([_padded(row.labels, length, IGNORED) for row in rows]),
        answers=torch.stack([_padded(answers, length, -1) for answers in shifted]),
        asked=tuple(asked for row in rows for asked in row.asked),
        pixels=pixels,
        grid=grid,
    )


def _visibility(branch: Tensor) -> Tensor:
    """Causal, and only the prefix, one's own branch, and oneself: [B, 1, L, L]."""
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    kin = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    return (causal & kin)[:, None]


def _padded(values: list[int], length: int, filler: int) -> Tensor:
    return torch.tensor(values + [filler] * (length - len(values)))


def _padded_positions(positions: list[tuple[int, int, int]], length: int) -> Tensor:
    return torch.tensor(positions + [(0, 0, 0)] * (length - len(positions))).T


@lru_cache(maxsize=4)
def _encoder(tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    @lru_cache(maxsize=20000)
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text).ids)

    return encode
