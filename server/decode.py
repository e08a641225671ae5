"""Bytes -> an upright RGB picture. Content decides the format; the header is checked before anything is decoded.

Owns: formats, orientation, colour modes. Does not know where the bytes come from, nor pixel budgets of models.
Runs in the media pool's threads. Place in a request's way: step 3, before the processor.
"""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass

from PIL import Image

from server.errors import WireError

logger = logging.getLogger("lorikeet.server")

MAX_SIDE = 65_535
"""Pixels; JPEG's own limit, and more than any sane picture has."""
ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the turn that puts the picture upright (EXIF 2.32, 4.6.4 A); 1 is upright."""


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """A picture whose header was read and found acceptable; its pixels are still encoded."""

    image: Image.Image
    num_pixels: int


def invalid_image(why: str) -> WireError:
    return WireError(400, "invalid_image", f"the image cannot be used: {why}")


def image_too_large(what: str, limit: str) -> WireError:
    return WireError(
        400, "image_too_large", f"the image has {what}; this server takes at most {limit}: shrink it"
    )


def sniff(data: bytes) -> str:
    """Pillow's name of the format, from the first bytes. Raises WireError for everything that is not accepted."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    raise invalid_image("its content is not PNG, JPEG, WebP or GIF" if data else "it is empty")


def open_image(data: bytes, max_pixels: int) -> OpenedImage:
    """Read the header only. Raises WireError: invalid_image, image_too_large."""
    kind = sniff(data)
    if kind == "WEBP":  # Pillow takes the canvas's memory when it opens one
        check_size(*_webp_size(data), max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except Image.DecompressionBombError as error:
        raise image_too_large("too many pixels", f"{max_pixels:,} pixels") from error
    except Exception as error:  # a decoder may raise anything at hostile bytes
        raise invalid_image("its header is damaged") from error
    check_size(image.width, image.height, max_pixels)
    return OpenedImage(image, image.width * image.height)


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise invalid_image("it has no pixels")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise image_too_large(f"{width} x {height} pixels", f"{max_pixels:,} pixels")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size of a WebP file (RFC 9649): the lossy, lossless and extended layouts."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8 " and len(data) >= 30:
        width, height = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (26, 28))
        return width, height
    if chunk == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise invalid_image("its header is damaged")


def decode(opened: OpenedImage, wanted_pixels: int | None = None) -> Image.Image:
    """Decode to upright RGB. ``wanted_pixels`` is what the model will resize to: a JPEG that is far larger is decoded
    at a fraction of its size, still at least twice as wide and as high as wanted. Raises WireError: invalid_image.
    """
    image = opened.image
    try:
        if wanted_pixels is not None:
            _draft(image, wanted_pixels)
        image.load()
        turn = _TURNS.get(_orientation(image))
        picture = _to_rgb(image)
        return picture.transpose(turn) if turn is not None else picture
    except WireError:
        raise
    except Exception as error:  # a decoder may raise anything at hostile bytes
        logger.debug("image.damaged error=%s", type(error).__name__)
        raise invalid_image("it is damaged or cut short") from error


def _draft(image: Image.Image, wanted_pixels: int) -> None:
    """Ask the JPEG decoder for 1/2, 1/4 or 1/8 of the size; other formats ignore it."""
    ratio = math.sqrt(4 * wanted_pixels / (image.width * image.height))
    if ratio < 1:
        image.draft(None, (math.ceil(image.width * ratio), math.ceil(image.height * ratio)))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 where there is none, or where the EXIF block itself is damaged."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 (its pixels are fine, only its notes are not)
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of the four formats to RGB; what is transparent becomes white."""
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits by scale; Pillow's own conversion clips at 255. 65,535 / 257 = 255."""
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(paper, image).convert("RGB")
