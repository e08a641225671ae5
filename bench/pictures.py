"""Pictures that a workload sends: drawn from a seed, as PNG in a data URI."""

from __future__ import annotations

import base64
import io
import random
from functools import lru_cache

from bench.trace import Picture

NUM_BLOCKS = 12
"""Coloured rectangles: enough that no two seeds look alike, few enough that a PNG stays small."""


@lru_cache(maxsize=64)
def png_bytes(picture: Picture) -> bytes:
    """The file of a picture."""
    from PIL import Image, ImageDraw

    rng = random.Random(picture.seed)
    image = Image.new("RGB", (picture.width, picture.height), _colour(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(NUM_BLOCKS):
        left, top = rng.randrange(picture.width), rng.randrange(picture.height)
        right, bottom = rng.randint(left, picture.width), rng.randint(top, picture.height)
        draw.rectangle((left, top, right, bottom), fill=_colour(rng))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_uri(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
