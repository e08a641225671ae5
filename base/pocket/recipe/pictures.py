"""Draws the few pictures that ship beside the checkpoint: `python -m base.pocket.recipe.pictures`.

Owns: base/pocket/pictures/*.png, for the quick start and for anybody's first question.
"""

from __future__ import annotations

from random import Random
from typing import Final

from base.pocket import PICTURES
from base.pocket.recipe.scenes import CELLS, FILLED_SCALE, Scene, Thing, draw


def _thing(color: str, shape: str, cell: str, fill: str = "solid") -> Thing:
    return Thing(shape, color, CELLS.index(cell), fill)


SHIPPED: Final = {
    "red_circle": Scene((_thing("red", "circle", "top left"),)),
    "star_and_square": Scene(
        (_thing("yellow", "star", "top right"), _thing("blue", "square", "bottom left"))
    ),
    "green_triangle": Scene((_thing("green", "triangle", "center"),)),
    "striped_square": Scene((_thing("blue", "square", "center", "striped"),), FILLED_SCALE),
}


def main() -> None:
    """Draw all of them."""
    PICTURES.mkdir(exist_ok=True)
    for number, (name, scene) in enumerate(SHIPPED.items()):
        draw(scene, Random(200 + number)).image.save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
