"""Questions about a scene and their answers, in plain English.

Owns: the kinds of question, their paraphrases, and the one right answer to each. Knows scenes; knows nothing of
pictures, tokens or models. Other answer languages (the sample adapters) start from the same `Asked` values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from base.pocket.recipe.scenes import CELLS, COLORS, SHAPES, Scene, Thing

NUMBERS: Final = ("no", "one", "two", "three", "four")
NOTHING: Final = "There is nothing in the picture."


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its kind, the right answer, and the things the answer speaks of."""

    kind: str
    question: str
    answer: str
    things: tuple[Thing, ...] = ()


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def place(thing: Thing) -> str:
    """Where a thing is, as an adverb: "at the top left"."""
    return f"at the {CELLS[thing.cell]}"


def name(thing: Thing) -> str:
    """What a thing is called: "red circle"."""
    return f"{thing.color} {thing.shape}"


DESCRIBE: Final = (
    "Describe this image.", "Describe the picture.", "What do you see?", "What is in this picture?",
    "What is in the image?", "Tell me what you see.", "What can you see here?", "Please describe this image.",
    "Describe what you see.", "What does the picture show?",
)  # fmt: skip
SHAPE_ONE: Final = (
    "What shape is it?", "What shape is this?", "What is the shape of the object?", "Which shape do you see?",
    "What shape is in the picture?", "Name the shape.",
)  # fmt: skip
SHAPE_OF: Final = (
    "What shape is the {color} object?", "What is the {color} object?", "Which shape is {color}?",
    "What is the shape of the {color} thing?", "What shape is the {color} one?",
)  # fmt: skip
COLOR_ONE: Final = (
    "What color is it?", "What color is this?", "What is the color of the object?", "Which color do you see?",
    "What color is the object?", "Name the color.", "What colour is it?",
)  # fmt: skip
COLOR_OF: Final = (
    "What color is the {shape}?", "What is the color of the {shape}?", "Which color does the {shape} have?",
    "What colour is the {shape}?", "Tell me the color of the {shape}.",
)  # fmt: skip
WHERE: Final = (
    "Where is the {name}?", "Where is the {name} in the picture?", "Where do you see the {name}?",
    "In which part of the image is the {name}?", "What is the position of the {name}?",
)  # fmt: skip
COUNT: Final = (
    "How many objects are there?", "How many objects are in the picture?", "How many things do you see?",
    "Count the objects.", "How many shapes are there?", "What is the number of objects?",
)  # fmt: skip
COUNT_OF: Final = (
    "How many {plural} are there?", "How many {plural} do you see?", "Count the {plural}.",
    "How many {plural} are in the picture?",
)  # fmt: skip
EXISTS: Final = (
    "Is there {name}?", "Is there {name} in the picture?", "Do you see {name}?", "Can you see {name}?",
)  # fmt: skip
AT: Final = (
    "What is {place}?", "What do you see {place}?", "Which object is {place}?", "What is {place} of the image?",
)  # fmt: skip


def answerable(scene: Scene) -> tuple[str, ...]:
    """The kinds the base is trained and scored on: all of one thing; of more, describing and counting them."""
    if len(scene.things) > 1:
        return "describe", "total"
    return "describe", "shape", "color", "where", "count", "exists"


def describe(scene: Scene, rng: Random) -> Asked | None:
    """Everything, in reading order."""
    return Asked("describe", rng.choice(DESCRIBE), description(scene), scene.things)


def description(scene: Scene) -> str:
    """A scene in one sentence."""
    parts = [f"{article(name(thing))} {place(thing)}" for thing in scene.things]
    if not parts:
        return NOTHING
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"There is {listed}."


def shape(scene: Scene, rng: Random) -> Asked | None:
    """The shape of the only thing, or of the only thing of its colour."""
    if len(scene.things) <= 1 and rng.random() < 0.6:
        answer = f"It is {article(scene.things[0].shape)}." if scene.things else NOTHING
        return Asked("shape", rng.choice(SHAPE_ONE), answer, scene.things)
    unique = [thing for thing in scene.things if sum(t.color == thing.color for t in scene.things) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    question = rng.choice(SHAPE_OF).format(color=thing.color)
    return Asked("shape", question, f"It is {article(thing.shape)}.", (thing,))


def color(scene: Scene, rng: Random) -> Asked | None:
    """The colour of the only thing, or of the only thing of its shape."""
    if len(scene.things) <= 1 and rng.random() < 0.6:
        answer = f"It is {scene.things[0].color}." if scene.things else NOTHING
        return Asked("color", rng.choice(COLOR_ONE), answer, scene.things)
    unique = [thing for thing in scene.things if sum(t.shape == thing.shape for t in scene.things) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return Asked("color", rng.choice(COLOR_OF).format(shape=thing.shape), f"It is {thing.color}.", (thing,))


def where(scene: Scene, rng: Random) -> Asked | None:
    """The cell of one thing, which now and then is not there."""
    if not scene.things or rng.random() < 0.1:
        absent = _absent(scene, rng)
        return Asked("where", rng.choice(WHERE).format(name=absent), f"There is no {absent}.")
    thing = rng.choice(scene.things)
    return Asked("where", rng.choice(WHERE).format(name=name(thing)), f"It is {place(thing)}.", (thing,))


def count(scene: Scene, rng: Random) -> Asked | None:
    """How many things, or things of a shape or a colour."""
    kind = rng.choice(("all", "all", "shape", "color"))
    if kind == "all":
        return total(scene, rng)
    if kind == "shape":
        wanted = _likely([thing.shape for thing in scene.things], SHAPES, rng)
        found, noun = tuple(t for t in scene.things if t.shape == wanted), wanted
    else:
        wanted = _likely([thing.color for thing in scene.things], tuple(COLORS), rng)
        found, noun = tuple(t for t in scene.things if t.color == wanted), f"{wanted} object"
    return Asked("count", rng.choice(COUNT_OF).format(plural=_plural(noun)), _i_see(len(found), noun), found)


def total(scene: Scene, rng: Random) -> Asked | None:
    """How many things in all."""
    return Asked("count", rng.choice(COUNT), _i_see(len(scene.things), "object"), scene.things)


def exists(scene: Scene, rng: Random) -> Asked | None:
    """Is it there? Yes in half of the cases."""
    template = rng.choice(EXISTS)
    if scene.things and rng.random() < 0.55:
        thing = rng.choice(scene.things)
        return Asked(
            "exists", template.format(name=article(name(thing))), f"Yes, it is {place(thing)}.", (thing,)
        )
    absent = _absent(scene, rng)
    return Asked("exists", template.format(name=article(absent)), f"No, there is no {absent}.")


def at(scene: Scene, rng: Random) -> Asked | None:
    """What is in a cell, most often in one that is not empty."""
    taken = [thing.cell for thing in scene.things]
    cell = rng.choice(taken) if taken and rng.random() < 0.8 else rng.randrange(len(CELLS))
    question = rng.choice(AT).format(place=place(Thing("", "", cell)))
    found = tuple(thing for thing in scene.things if thing.cell == cell)
    answer = f"There is {article(name(found[0]))}." if found else "There is nothing there."
    return Asked("at", question, answer, found)


ASKERS: Final[dict[str, Callable[[Scene, Random], Asked | None]]] = {
    "describe": describe, "shape": shape, "color": color, "where": where, "count": count, "exists": exists,
    "at": at,
}  # fmt: skip


MORE_ASKERS: Final[dict[str, Callable[[Scene, Random], Asked | None]]] = {"total": total}


def ask(scene: Scene, rng: Random, kinds: tuple[str, ...] = tuple(ASKERS)) -> Asked:
    """One question of one of `kinds` (describe always can be asked)."""
    asked = (ASKERS | MORE_ASKERS)[rng.choice(kinds)](scene, rng)
    return asked if asked is not None else ask(scene, rng, (*kinds, "describe"))


def loosely(question: str, rng: Random) -> str:
    """The question as people type it: sometimes in lower case, without its mark, or with a please."""
    if rng.random() < 0.1:
        question = f"Please tell me: {question[0].lower()}{question[1:]}"
    if rng.random() < 0.25:
        question = question.lower()
    return question[:-1] if rng.random() < 0.2 else question


def _absent(scene: Scene, rng: Random) -> str:
    present = {name(thing) for thing in scene.things}
    wanted = f"{rng.choice(tuple(COLORS))} {rng.choice(SHAPES)}"
    return wanted if wanted not in present else _absent(scene, rng)


def _likely(present: list[str], known: tuple[str, ...], rng: Random) -> str:
    return rng.choice(present) if present and rng.random() < 0.7 else rng.choice(known)


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _i_see(number: int, noun: str) -> str:
    return f"I see {NUMBERS[number]} {noun if number == 1 else _plural(noun)}."
