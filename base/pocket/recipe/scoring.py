"""Held-out scores: the share of answers that are exact, and what remains when the picture is taken away.

Owns: the held-out examples and the three ways of seeing them. An answer is exact when each of its tokens, the end of
turn among them, is the model's first choice: greedy decoding then gives precisely this answer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from base.pocket.recipe.data import HELD_OUT_SEED, Asker, Example, Mixture, make_example, picture_turn
from base.pocket.recipe.forward import exact, run
from base.pocket.recipe.pixels import patchify
from base.pocket.recipe.scenes import blank

Sight = Literal["real", "blank", "swapped"]
NEEDS_NO_PICTURE: Final = "chat"
HELD_OUT: Final = Mixture(num_pictures=16)


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of exact answers: over all, over questions that need the picture, and by kind; and how many."""

    exact: float
    exact_about_pictures: float
    by_kind: dict[str, float]
    num_questions: int


@torch.no_grad()
def score(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Tokenizer,
    num_batches: int,
    sight: Sight = "real",
    mixture: Mixture = HELD_OUT,
    asker: Asker = picture_turn,
) -> Score:
    """Score `model` on the first `num_batches` held-out batches of `mixture`."""
    right: dict[str, list[bool]] = defaultdict(list)
    for index in range(num_batches):
        example = make_example(tokenizer, mixture, HELD_OUT_SEED + index, asker)
        batch = replace(example.batch, pixels=_pixels(example, sight))
        for kind, is_right in zip(batch.kinds, exact(run(model, batch), len(batch.kinds)), strict=True):
            right[kind].append(bool(is_right))
    everything = [value for values in right.values() for value in values]
    seeing = [value for kind, values in right.items() if kind != NEEDS_NO_PICTURE for value in values]
    by_kind = {kind: _share(values) for kind, values in sorted(right.items())}
    return Score(_share(everything), _share(seeing), by_kind, len(everything))


def _pixels(example: Example, sight: Sight) -> Tensor:
    """The pictures themselves, an even grey in their place, or each picture in its neighbour's place."""
    if sight == "blank":
        return torch.stack([torch.from_numpy(patchify(blank(picture))[0]) for picture in example.pictures])
    return example.batch.pixels.roll(1, dims=0) if sight == "swapped" else example.batch.pixels


def _share(values: list[bool]) -> float:
    return sum(values) / max(1, len(values))
