"""Batches without end: scenes drawn, asked about and written into rows.

Owns: the mixture (how many questions per picture, single turns and chains, pictures before and after the question,
small talk, rows without a picture). A batch is a pure function of the seed and its number, so held-out batches are
those of another seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from base.pocket.recipe.pixels import MERGE, patch_grid, patchify
from base.pocket.recipe.questions import Asked, answerable, ask, loosely
from base.pocket.recipe.rows import Batch, Row, RowWriter, collate
from base.pocket.recipe.scenes import CELLS, COLORS, SHAPES, Picture, draw, sample_scene
from base.pocket.recipe.smalltalk import SYSTEM_PROMPTS, chat, without_picture

NO_THING: Final = 0
IGNORED: Final = -100
HELD_OUT_SEED: Final = 9_000_000
ASPECTS: Final = ((0.88, 1.14), (1.18, 1.33), (0.752, 0.847))  # even, wide, tall
ASPECT_WEIGHTS: Final = (76, 12, 12)

Asker = Callable[[Picture, Random], Asked]


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a batch holds."""

    num_pictures: int = 12
    num_text_rows: int = 1
    num_branches: int = 6
    max_things: int = 2
    fills: tuple[str, ...] = ("solid",)


def picture_turn(picture: Picture, rng: Random) -> Asked:
    """The base's own turn: a question about the picture, or now and then small talk."""
    return typed(
        chat(rng) if rng.random() < 0.05 else ask(picture.scene, rng, answerable(picture.scene)), rng
    )


@dataclass(frozen=True, slots=True)
class Example:
    """A batch, what lies under each merged token (for the training-only heads), and the pictures themselves."""

    batch: Batch
    shapes: Tensor  # [P, M] int64: 0 nothing, 1 + shape, or IGNORED
    colors: Tensor  # [P, M] int64
    counts: Tensor  # [P] int64
    pictures: tuple[Picture, ...]


def make_example(tokenizer: Tokenizer, mixture: Mixture, seed: int, asker: Asker = picture_turn) -> Example:
    """The batch of this seed. All its pictures fall on one grid; `asker` makes each turn."""
    rng = Random(seed)
    pictures = _pictures_of_one_grid(mixture, rng)
    patched = [patchify(picture.image) for picture in pictures]
    grid = patched[0][1]
    merged = (grid[0] // MERGE, grid[1] // MERGE)
    rows = [_picture_row(tokenizer, picture, merged, mixture, rng, asker) for picture in pictures]
    rows += [_text_row(tokenizer, mixture, rng) for _ in range(mixture.num_text_rows)]
    pixels = torch.stack([torch.from_numpy(patches) for patches, _ in patched])
    targets = [_targets(picture, merged) for picture in pictures]
    return Example(
        batch=collate(rows, pixels, grid),
        shapes=torch.tensor([shapes for shapes, _ in targets]),
        colors=torch.tensor([colors for _, colors in targets]),
        counts=torch.tensor([len(picture.scene.things) for picture in pictures]),
        pictures=tuple(pictures),
    )


def _pictures_of_one_grid(mixture: Mixture, rng: Random) -> list[Picture]:
    """Draw until enough pictures share a grid; the first to be complete wins."""
    by_grid: dict[tuple[int, int], list[Picture]] = {}
    aspects = rng.choices(ASPECTS, ASPECT_WEIGHTS)[0]
    while True:
        scene = sample_scene(rng, mixture.max_things, mixture.fills, twins=0.12, apart=True)
        picture = draw(scene, rng, rng.uniform(*aspects))
        same = by_grid.setdefault(patch_grid(picture.image), [])
        same.append(picture)
        if len(same) == mixture.num_pictures:
            return same


def _picture_row(
    tokenizer: Tokenizer,
    picture: Picture,
    merged: tuple[int, int],
    mixture: Mixture,
    rng: Random,
    asker: Asker,
) -> Row:
    writer = RowWriter(tokenizer, merged)
    comes_first = rng.random() < 0.8
    writer.start(rng.choice(SYSTEM_PROMPTS), shows_picture=comes_first)
    if comes_first:
        _ask_in_branches(writer, picture, mixture.num_branches, rng, asker)
    else:
        for _ in range(max(1, mixture.num_branches // 3)):
            writer.branch([asker(picture, rng)], picture_after=True)
    return writer.finish()


def _ask_in_branches(
    writer: RowWriter, picture: Picture, num_questions: int, rng: Random, asker: Asker
) -> None:
    left = num_questions
    while left > 0:
        length = 1 if rng.random() < 0.65 else rng.randint(2, 3)
        writer.branch([asker(picture, rng) for _ in range(length)])
        left -= length


def typed(asked: Asked, rng: Random) -> Asked:
    """The same, with its question as people type it."""
    return Asked(asked.kind, loosely(asked.question, rng), asked.answer, asked.things)


def _text_row(tokenizer: Tokenizer, mixture: Mixture, rng: Random) -> Row:
    writer = RowWriter(tokenizer, None)
    writer.start(rng.choice(SYSTEM_PROMPTS), shows_picture=False)
    for _ in range(mixture.num_branches):
        writer.branch([_text_turn(rng) for _ in range(1 if rng.random() < 0.7 else 2)])
    return writer.finish()


def _text_turn(rng: Random) -> Asked:
    if rng.random() < 0.8:
        return typed(chat(rng), rng)
    return typed(without_picture(ask(sample_scene(rng), rng)), rng)


def subject(asked: Asked) -> tuple[int, int, int]:
    """Labels (shape, colour, cell) of the one thing a question means; `NO_THING` where it is not there."""
    if asked.kind not in ("shape", "color", "where", "exists", "at"):
        return IGNORED, IGNORED, IGNORED
    if not asked.things:
        return NO_THING, NO_THING, NO_THING
    thing = asked.things[0]
    return 1 + SHAPES.index(thing.shape), 1 + list(COLORS).index(thing.color), 1 + thing.cell


def token_under(center: tuple[float, float], merged: tuple[int, int]) -> int:
    """Index of the picture token over a point (x, y), in a grid of (down, across) tokens."""
    down, across = merged
    return int(center[1] * down) * across + int(center[0] * across)


def _targets(picture: Picture, merged: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Shape and colour under each merged token: the token over a middle knows it, its neighbours are not asked."""
    down, across = merged
    shapes, colors = [NO_THING] * (down * across), [NO_THING] * (down * across)
    reach_x, reach_y = 0.17 + 0.5 / across, 0.17 + 0.5 / down
    for index in range(down * across):
        x, y = (index % across + 0.5) / across, (index // across + 0.5) / down
        if any(abs(x - cx) < reach_x and abs(y - cy) < reach_y for cx, cy in picture.centers):
            shapes[index] = colors[index] = IGNORED
    for thing, (x, y) in zip(picture.scene.things, picture.centers, strict=True):
        index = token_under((x, y), merged)
        shapes[index] = 1 + SHAPES.index(thing.shape)
        colors[index] = 1 + list(COLORS).index(thing.color)
    return shapes, colors


NUM_SHAPE_LABELS: Final = 1 + len(SHAPES)
NUM_COLOR_LABELS: Final = 1 + len(COLORS)
NUM_CELL_LABELS: Final = 1 + len(CELLS)
