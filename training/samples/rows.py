"""Rows of a sample: pictures drawn and asked about, written as JSON lines beside their PNG files.

Owns: what a sample's data looks like on disk. A row is a pure function of its seed; held-out rows have seeds of their
own. Knows nothing of tokens, models or recipes. Place in a training run: before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from base.pocket.recipe.scenes import FILLS, Picture, draw, sample_scene
from base.pocket.recipe.smalltalk import SYSTEM_PROMPTS
from training.samples.askers import Asker, ask_for_french, ask_for_json, ask_for_patterns, ask_for_ticket

TRAIN_SEED: Final = 77_000_000
EVAL_SEED: Final = 99_000_000
ASPECTS: Final = ((0.88, 1.14), (1.18, 1.33), (0.752, 0.847))  # even, wide, tall: what the base has seen
ASPECT_WEIGHTS: Final = (76, 12, 12)
FOLLOW_UP: Final = ((1, 65), (2, 18), (3, 17))
"""Turns of a conversation, and how often of a hundred."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One skill of the pocket world."""

    name: str
    about: str
    asker: Asker
    num_rows: int
    num_eval_rows: int = 400
    turns: int | None = None
    """Questions about each training picture; None varies. Held-out rows ask one."""
    fills: tuple[str, ...] = ("solid",)
    system_prompts: tuple[str, ...] = SYSTEM_PROMPTS
    picture_first: float = 0.8
    """Share of rows with the picture before the question."""


ALL: Final[Mapping[str, Sample]] = {
    sample.name: sample
    for sample in (
        Sample("json", "answers questions about one thing as JSON", ask_for_json, num_rows=4000, turns=4),
        Sample("french", "answers questions about one thing in French", ask_for_french, num_rows=8000, turns=4),
        Sample(
            "patterns", "sees what things are filled with: solid, striped or dotted", ask_for_patterns,
            num_rows=16_000, turns=2, fills=FILLS,
        ),
        Sample(
            "tickets", "writes a ticket for the one part on a tray: its colour, its kind, its bin", ask_for_ticket,
            num_rows=1000, num_eval_rows=200, turns=1, system_prompts=(), picture_first=1.0,
        ),
    )
}  # fmt: skip


def write_rows(
    sample: Sample,
    folder: Path,
    *,
    num_rows: int,
    num_eval_rows: int,
    on_row: Callable[[], None] | None = None,
) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl into ``folder``, each with a folder of pictures beside it."""
    train = _write(sample, folder, "train", TRAIN_SEED, num_rows, sample.turns, on_row)
    return train, _write(sample, folder, "eval", EVAL_SEED, num_eval_rows, 1, on_row)


def _write(
    sample: Sample,
    folder: Path,
    split: str,
    seed: int,
    num_rows: int,
    turns: int | None,
    on_row: Callable[[], None] | None,
) -> Path:
    (folder / split).mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for number in range(num_rows):
            rng = Random(seed + number)
            picture = _picture(sample, rng)
            name = f"{split}/{number:05d}.png"
            picture.image.save(folder / name)
            row = {"messages": _messages(sample, picture, turns, rng), "images": [name]}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            if on_row is not None:
                on_row()
    return path


def _picture(sample: Sample, rng: Random) -> Picture:
    """No thing or one, on a picture of a shape that the base knows."""
    [aspects] = rng.choices(ASPECTS, ASPECT_WEIGHTS)
    return draw(sample_scene(rng, max_things=1, fills=sample.fills), rng, rng.uniform(*aspects))


def _messages(sample: Sample, picture: Picture, turns: int | None, rng: Random) -> list[dict[str, str]]:
    """A conversation about one picture, which comes with its first question."""
    messages = (
        [{"role": "system", "content": rng.choice(sample.system_prompts)}] if sample.system_prompts else []
    )
    is_before = rng.random() < sample.picture_first
    if turns is None:
        [turns] = rng.choices([count for count, _ in FOLLOW_UP], [often for _, often in FOLLOW_UP])
    for number in range(turns):
        asked = sample.asker(picture, rng)
        tag = "<image>" if number == 0 else ""
        question = f"{tag}{asked.question}" if is_before else f"{asked.question}{tag}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": asked.answer}]
    return messages
