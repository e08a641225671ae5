"""What each sample adapter is asked about a picture of the pocket world, and what it should answer.

Owns: the answers in JSON, in French, about patterns, and as sorting tickets. Knows scenes and questions of the pocket
recipe; knows nothing of files, tokens or models. Place in a training run: before it; rows are made of these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Final

from base.pocket.recipe import french
from base.pocket.recipe.questions import Asked, answerable, ask, loosely, place
from base.pocket.recipe.scenes import CELLS, Picture, Thing

Asker = Callable[[Picture, Random], Asked]

# ---- json


def ask_for_json(picture: Picture, rng: Random) -> Asked:
    """The base's questions but those of yes and no, answered as JSON."""
    asked = _typed(ask(picture.scene, rng, JSON_KINDS), rng)
    if asked.kind == "where" and not asked.things:
        return ask_for_json(picture, rng)
    return replace(asked, answer=json.dumps(_JSON[asked.kind](asked.things)))


JSON_KINDS: Final = ("describe", "describe", "shape", "color", "where", "count")


def _as_json(thing: Thing) -> dict[str, str]:
    return {"shape": thing.shape, "color": thing.color, "position": CELLS[thing.cell]}


_JSON: Final[dict[str, Callable[[tuple[Thing, ...]], object]]] = {
    "describe": lambda things: [_as_json(thing) for thing in things],
    "shape": lambda things: {"shape": things[0].shape if things else None},
    "color": lambda things: {"color": things[0].color if things else None},
    "where": lambda things: {"position": CELLS[things[0].cell] if things else None},
    "count": lambda things: {"count": len(things)},
}

# ---- french


def ask_for_french(picture: Picture, rng: Random) -> Asked:
    """The base's questions, answered in French."""
    asked = _typed(ask(picture.scene, rng, answerable(picture.scene)), rng)
    return replace(asked, answer=french.translate(asked, french.SIDES))


# ---- patterns


def ask_for_patterns(picture: Picture, rng: Random) -> Asked:
    """What a thing is filled with, which the base has never seen and has no answer for."""
    if not picture.scene.things:
        return _typed(Asked("pattern", rng.choice(PATTERN_ONE), "There is no pattern."), rng)
    thing = rng.choice(picture.scene.things)
    alone = len(picture.scene.things) == 1 and rng.random() < 0.6
    question = rng.choice(PATTERN_ONE) if alone else rng.choice(PATTERN_AT).format(place=place(thing))
    return _typed(Asked("pattern", question, f"It is {thing.fill}.", (thing,)), rng)


PATTERN_ONE: Final = (
    "What pattern is it?", "What pattern do you see?", "Which pattern does the object have?",
    "What is the fill of the object?", "Is it solid, striped or dotted?",
)  # fmt: skip
PATTERN_AT: Final = (
    "What pattern is {place}?", "Which pattern does the object {place} have?", "What is the fill {place}?",
    "What pattern do you see {place}?",
)  # fmt: skip

# ---- tickets


def ask_for_ticket(picture: Picture, rng: Random) -> Asked:
    """Where a part goes in a cabinet of nine bins, as a ticket: a new form, and names that the base never heard."""
    things = picture.scene.things
    return Asked("ticket", rng.choice(TICKET), json.dumps(ticket(things)), things)


TICKET: Final = ("Write the ticket.", "Which bin?", "Sort this part.")
BINS: Final = tuple(f"{row}{column}" for row in "ABC" for column in "123")
"""The bin of each cell of the grid."""


def ticket(things: tuple[Thing, ...]) -> dict[str, str | None]:
    """What is written about a tray with one part on it, or none."""
    if not things:
        return {"color": None, "part": None, "bin": None}
    return {"color": things[0].color, "part": things[0].shape, "bin": BINS[things[0].cell]}


def _typed(asked: Asked, rng: Random) -> Asked:
    """The same, with its question as people type it."""
    return replace(asked, question=loosely(asked.question, rng))
