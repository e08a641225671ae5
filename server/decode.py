"""Bytes -> an upright RGB picture. Content decides the format; the header is checked before anything is decoded.

Owns: which formats are taken, and what is refused before decoding. Does not know where the bytes come from, nor pixel
budgets of models, nor how pixels are made (`base/decode.py`).
Runs in the media pool's threads. Place in a request's way: step 3, before the processor.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass

from PIL import Image

from base.decode import decode as upright_rgb
from server.errors import WireError

logger = logging.getLogger("lorikeet.server")

MAX_SIDE = 65_535
"""Pixels; JPEG's own limit, and more than any sane picture has."""


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
    try:
        return upright_rgb(opened.image, wanted_pixels)
    except Exception as error:  # a decoder may raise anything at hostile bytes
        logger.debug("image.damaged error=%s", type(error).__name__)
        raise invalid_image("it is damaged or cut short") from error
