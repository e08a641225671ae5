"""Scenes and the pictures drawn from them.

Owns: what a scene is (things in a 3 x 3 grid of cells) and how pillow draws it. Knows nothing of questions, tokens
or models. A picture is a pure function of its scene and the random generator handed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
COLORS: Final = {
    "red": (214, 32, 32),
    "green": (34, 150, 50),
    "blue": (36, 70, 214),
    "yellow": (244, 218, 30),
    "orange": (246, 134, 16),
    "purple": (126, 36, 158),
    "pink": (250, 130, 190),
}
CELLS: Final = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
FILLS: Final = ("solid", "striped", "dotted")
BACKGROUNDS: Final = (
    (255, 255, 255), (245, 245, 245), (225, 225, 225), (190, 190, 190), (90, 90, 90), (40, 40, 40), (0, 0, 0),
    (240, 232, 214), (214, 228, 240), (222, 238, 222), (60, 56, 70), (46, 58, 58),
)  # fmt: skip
FILLED_SCALE: Final = (
    1.7  # where fills are to be told apart; a usual thing is little more than one token wide
)
NUM_THINGS_WEIGHTS: Final = (4, 43, 32, 15, 6)  # of 0, 1, 2, 3, 4 things


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing in a scene; `cell` indexes `CELLS` in reading order."""

    shape: str
    color: str
    cell: int
    fill: str = "solid"


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in reading order, no two alike and no two in one cell."""

    things: tuple[Thing, ...]
    scale: float = 1.0
    """How much larger than usual its things are drawn."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn scene. `centers`: the things' middles as fractions (x, y) of width and height."""

    image: Image.Image
    scene: Scene
    centers: tuple[tuple[float, float], ...]


def sample_scene(
    rng: Random,
    max_things: int = 4,
    fills: tuple[str, ...] = ("solid",),
    twins: float = 0.3,
    apart: bool = False,
) -> Scene:
    """Draw a scene of at most `max_things` things, with fills taken evenly from `fills`.

    `twins`: how often two of several things share a shape or a colour; `apart`: no thing right beside another.
    """
    counts = range(max_things + 1)
    [count] = rng.choices(counts, NUM_THINGS_WEIGHTS[: max_things + 1])
    cells = sorted(rng.sample(range(len(CELLS)), count))
    while apart and any(_touch(one, other) for one, other in combinations(cells, 2)):
        cells = sorted(rng.sample(range(len(CELLS)), count))
    pairs = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], count)
    if count > 1 and rng.random() < twins:
        pairs = _with_twins(pairs, rng)
    things = tuple(Thing(s, c, cell, rng.choice(fills)) for (s, c), cell in zip(pairs, cells, strict=True))
    return Scene(things, FILLED_SCALE if len(fills) > 1 else 1.0)


def _touch(one: int, other: int) -> bool:
    return abs(one // 3 - other // 3) + abs(one % 3 - other % 3) == 1


def _with_twins(pairs: list[tuple[str, str]], rng: Random) -> list[tuple[str, str]]:
    """Give two things one shape or one colour, so that counting is more than looking for a word."""
    (shape, color), (other_shape, other_color) = pairs[0], pairs[1]
    twin = (shape, other_color) if rng.random() < 0.5 else (other_shape, color)
    return pairs if twin in pairs else [pairs[0], twin, *pairs[2:]]


def draw(scene: Scene, rng: Random, aspect: float = 1.0) -> Picture:
    """Draw `scene` at a random size of `aspect` (width over height), on a random, now and then noisy background."""
    width, height = _sample_size(aspect, rng)
    image = _background(width, height, rng)
    centers = tuple(_draw_thing(image, thing, scene.scale, rng) for thing in scene.things)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.006 * min(width, height))))
    if rng.random() < 0.4:
        image = _noisy(image, rng)
    return Picture(image, scene, centers)


def blank(picture: Picture) -> Image.Image:
    """An even grey image of the same size: what is left when there is nothing to see."""
    return Image.new("RGB", picture.image.size, (225, 225, 225))


def _sample_size(aspect: float, rng: Random) -> tuple[int, int]:
    side = rng.uniform(90, 200) if rng.random() < 0.85 else rng.uniform(200, 400)
    root = math.sqrt(aspect)
    return round(side * root), round(side / root)


def _background(width: int, height: int, rng: Random) -> Image.Image:
    start = _jitter(rng.choice(BACKGROUNDS), 6, rng)
    if rng.random() < 0.7:
        return Image.new("RGB", (width, height), start)
    shade = rng.uniform(-40, 40)
    end = tuple(min(255.0, max(0.0, channel + shade)) for channel in start)
    ramp = np.linspace(start, end, height if rng.random() < 0.5 else width)
    pixels = ramp[:, None, :] if len(ramp) == height else ramp[None, :, :]
    return Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).astype(np.uint8))


def _jitter(color: tuple[int, int, int], amount: int, rng: Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)
    return red, green, blue


def _noisy(image: Image.Image, rng: Random) -> Image.Image:
    pixels = np.asarray(image, dtype=np.int16)
    amount = rng.randint(3, 20)
    noise = np.random.default_rng(rng.getrandbits(32)).integers(
        -amount, amount + 1, pixels.shape, dtype=np.int16
    )
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _draw_thing(image: Image.Image, thing: Thing, scale: float, rng: Random) -> tuple[float, float]:
    """Draw in place, wholly inside the thing's cell at scale 1; the returned middle is (x, y) as fractions."""
    cell_width, cell_height = image.width / 3, image.height / 3
    room = min(cell_width, cell_height)
    radius = rng.uniform(0.33, 0.46) * room
    x = (thing.cell % 3 + 0.5) * cell_width + rng.uniform(-1, 1) * (0.48 * room - radius)
    y = (thing.cell // 3 + 0.5) * cell_height + rng.uniform(-1, 1) * (0.48 * room - radius)
    radius *= scale
    color = _jitter(COLORS[thing.color], 10, rng)
    if thing.fill == "solid":
        _outline(ImageDraw.Draw(image), thing.shape, x, y, radius, color, rng)
    else:
        mask = Image.new("1", image.size)
        _outline(ImageDraw.Draw(mask), thing.shape, x, y, radius, 1, rng)
        image.paste(_textured(image, thing.fill, color, (x, y), radius, rng), mask=mask)
    return x / image.width, y / image.height


def _outline(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float,
    ink: int | tuple[int, int, int], rng: Random,
) -> None:  # fmt: skip
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        return
    tilt = rng.uniform(-0.14, 0.14)
    pen.polygon(
        [(x + r * math.sin(a + tilt), y - r * math.cos(a + tilt)) for r, a in _corners(shape, radius)], ink
    )


def _corners(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corners as (distance, angle clockwise from noon)."""
    if shape == "square":
        return [(radius * 1.15, math.pi * (0.25 + 0.5 * k)) for k in range(4)]
    if shape == "triangle":
        return [(radius * 1.1, math.pi * 2 * k / 3) for k in range(3)]
    if shape == "star":
        return [(radius * (1.1 if k % 2 == 0 else 0.45), math.pi * k / 5) for k in range(10)]
    arm, notch = radius * 1.05, radius * 0.45
    ends = [(math.hypot(arm, notch / 1.4), math.atan2(s * notch / 1.4, arm)) for s in (-1, 1)]
    inner = (notch, math.pi / 4)
    return [(r, a + math.pi / 2 * k) for k in range(4) for r, a in (*ends, inner)]


def _textured(
    image: Image.Image, fill: str, color: tuple[int, int, int], middle: tuple[float, float],
    radius: float, rng: Random,
) -> Image.Image:  # fmt: skip
    """The whole image covered by one texture, about `middle`, of `color` and a light or dark second ink.

    Coarse enough to be seen at 28 pixels a token: bars of half a radius, or one dot.
    """
    other = (250, 250, 250) if sum(color) < 480 else (20, 20, 20)
    rows, columns = np.mgrid[0 : image.height, 0 : image.width]
    down, across = rows - middle[1], columns - middle[0]
    along = down if rng.random() < 0.5 else across
    inside = {
        "striped": (along / radius + 0.25) % 1 < 0.5,
        "dotted": np.hypot(down, across) < 0.5 * radius,
    }[fill]
    pixels = np.where(inside[..., None], np.array(other), np.array(color)).astype(np.uint8)
    return Image.fromarray(pixels)
