"""The same answers in French: the words of the `french` sample adapter, known to the tokenizer from the start.

Owns: the translation of an answer, made from what was asked and not from the English words.
"""

from __future__ import annotations

from typing import Final

from base.pocket.recipe.questions import Asked
from base.pocket.recipe.scenes import Thing

SHAPES: Final = {
    "circle": "cercle", "square": "carré", "triangle": "triangle", "star": "étoile", "cross": "croix",
}  # fmt: skip
FEMININE: Final = ("star", "cross")
COLORS: Final = {
    "red": ("rouge", "rouge"), "green": ("vert", "verte"), "blue": ("bleu", "bleue"), "yellow": ("jaune", "jaune"),
    "orange": ("orange", "orange"), "purple": ("violet", "violette"), "pink": ("rose", "rose"),
}  # fmt: skip
PLACES: Final = (
    "en haut à gauche", "en haut", "en haut à droite", "à gauche", "au centre", "à droite", "en bas à gauche",
    "en bas", "en bas à droite",
)  # fmt: skip
SIDES: Final = (
    "côté haut gauche", "côté haut", "côté haut droite", "côté gauche", "côté centre", "côté droite", "côté bas gauche",
    "côté bas", "côté bas droite",
)  # fmt: skip
"""The same with one beginning, as in English: the place is looked up once, where it is said, and not a word before."""
NOTHING: Final = "Il n'y a rien."
ABSENT: Final = "Il n'y en a pas."


def noun(thing: Thing) -> str:
    """A thing with its article: "une étoile verte"."""
    feminine = thing.shape in FEMININE
    return f"{'une' if feminine else 'un'} {SHAPES[thing.shape]} {COLORS[thing.color][feminine]}"


def translate(asked: Asked, places: tuple[str, ...] = PLACES) -> str:
    """The French answer to a question about a picture; `places` are the names of the nine cells."""
    if not asked.things:
        return ABSENT if asked.kind in ("exists", "where", "count") else NOTHING
    return _ANSWERS[asked.kind](asked.things, places)


def _describe(things: tuple[Thing, ...], places: tuple[str, ...]) -> str:
    parts = [f"{noun(thing)} {places[thing.cell]}" for thing in things]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} et {parts[-1]}"
    return f"Il y a {listed}."


def _shape(things: tuple[Thing, ...], _: tuple[str, ...]) -> str:
    return f"C'est {'une' if things[0].shape in FEMININE else 'un'} {SHAPES[things[0].shape]}."


_ANSWERS: Final = {
    "describe": _describe,
    "shape": _shape,
    "color": lambda things, _: f"La couleur est {COLORS[things[0].color][0]}.",
    "where": lambda things, places: f"C'est {places[things[0].cell]}.",
    "count": lambda things, _: f"Il y en a {('un', 'deux', 'trois', 'quatre')[len(things) - 1]}.",
    "exists": lambda things, places: f"Oui, {places[things[0].cell]}.",
    "at": lambda things, _: f"Il y a {noun(things[0])}.",
}
