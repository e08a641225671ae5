"""decode: an opened picture to upright RGB. What is trained on and what is served come through here, pixel for pixel.

Owns: orientation, colour modes, and decoding a large JPEG at a fraction of its size. Does not know: where pictures come
from, nor how large they may be. Place in a request's way: step 3, before the processor.
"""

from __future__ import annotations

import math
from typing import Final

from PIL import Image

_ORIENTATION_TAG: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.32, 4.6.4 A


def decode(image: Image.Image, wanted_pixels: int | None = None) -> Image.Image:
    """``wanted_pixels`` is what the base will resize to: a far larger JPEG is decoded at least twice as wide and high.

    Raises whatever the decoder raises at damaged bytes.
    """
    if wanted_pixels is not None:
        _draft(image, wanted_pixels)
    image.load()
    turn = _TURNS.get(orientation(image))
    picture = _to_rgb(image)
    return picture.transpose(turn) if turn is not None else picture


def _draft(image: Image.Image, wanted_pixels: int) -> None:
    """Ask the JPEG decoder for 1/2, 1/4 or 1/8 of the size; other formats ignore it."""
    ratio = math.sqrt(4 * wanted_pixels / (image.width * image.height))
    if ratio < 1:
        image.draft(None, (math.ceil(image.width * ratio), math.ceil(image.height * ratio)))


def orientation(image: Image.Image) -> int:
    """EXIF's; 1 where there is none, or where the block itself is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 (its pixels are fine, only its notes are not)
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit grey by scale (65,535 / 257 = 255, where Pillow clips), what is transparent on white."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
