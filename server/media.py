"""MediaLoader: an image part's URL -> a decoded picture with its pixel budget, or a clear refusal.

Owns: data: URLs, the media policy, what one request may spend, and the small pool in which pictures are decoded. Does
not know patches or models. Place in a request's way: step 3.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote_to_bytes

from base.prompt import ImagePart
from server.decode import OpenedImage, decode, image_too_large, invalid_image, open_image
from server.errors import WireError
from server.fetch import Fetcher, FetchPolicy, url_rejected

if TYPE_CHECKING:
    from server.settings import Settings

T = TypeVar("T")
PixelRange = tuple[int | None, int | None]
"""(min_pixels, max_pixels); None leaves the checkpoint's own."""

NUM_DECODERS = 2
"""Threads: decoding lets go of the interpreter; two pictures of 16.8 M pixels take some 300 MB while they decode."""
LOW_MIN_PIXELS = 4 * 28 * 28
LOW_MAX_PIXELS = 64 * 28 * 28
"""``detail: low``: at most 64 tokens of 28 x 28 pixels, as OpenAI's low is a fixed small cost; and never more than the
base's own most, which may be less."""
DETAILS = ("auto", "low", "high", "original")
_BASE64 = re.compile(r"(?i);\s*base64\s*$")


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """``max_*`` of one image; ``request_*`` of all images of one request together."""

    max_bytes: int
    max_pixels: int
    request_images: int
    request_bytes: int
    request_pixels: int
    original_max_pixels: int
    """What ``detail: original`` keeps."""
    default_max_pixels: int
    """What the base itself resizes to; only for decoding large JPEGs at a fraction of their size."""

    @classmethod
    def of(cls, settings: Settings, base_max_pixels: int) -> MediaLimits:
        return cls(
            max_bytes=int(settings.max_image_bytes),
            max_pixels=settings.max_image_pixels,
            request_images=settings.max_images,
            request_bytes=int(settings.max_request_image_bytes),
            request_pixels=settings.max_request_image_pixels,
            original_max_pixels=settings.original_max_pixels,
            default_max_pixels=base_max_pixels,
        )


class MediaBudget:
    """What one request may still spend. One per request; every image of it is charged here."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self.num_images = 0
        self.num_bytes = 0
        self.num_pixels = 0

    def take_image(self) -> None:
        self.num_images += 1
        if self.num_images > self._limits.request_images:
            limit = self._limits.request_images
            raise WireError(
                400, "invalid_request", f"the request has over {limit} images, the limit here: send fewer"
            )

    def take_bytes(self, count: int) -> None:
        self.num_bytes += count
        if self.num_bytes > self._limits.request_bytes:
            raise image_too_large(
                "with the others of its request too many bytes", f"{self._limits.request_bytes:,}"
            )

    def take_pixels(self, count: int) -> None:
        self.num_pixels += count
        if self.num_pixels > self._limits.request_pixels:
            raise image_too_large(
                "with the others of its request too many pixels", f"{self._limits.request_pixels:,}"
            )


class MediaLoader:
    """Safe for many requests at once, on one event loop."""

    def __init__(self, limits: MediaLimits, fetcher: Fetcher) -> None:
        self.limits = limits
        self._fetcher = fetcher
        self._pool = ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="lorikeet-decode")

    @classmethod
    def of(cls, settings: Settings, base_max_pixels: int) -> MediaLoader:
        policy = FetchPolicy(settings.resolved_media_policy, settings.media_allowlist)
        return cls(MediaLimits.of(settings, base_max_pixels), Fetcher(policy))

    def budget(self) -> MediaBudget:
        """A fresh budget for one request."""
        return MediaBudget(self.limits)

    async def load(
        self,
        url: str,
        detail: str = "auto",
        budget: MediaBudget | None = None,
        usual: PixelRange = (None, None),
    ) -> ImagePart:
        """The picture at ``url``, upright and RGB, with the pixel range that ``detail`` asks for; auto is ``usual``.

        Raises WireError: invalid_request (detail, too many images), invalid_image, image_too_large,
        media_url_rejected, media_fetch_failed.
        """
        if detail not in DETAILS:
            raise WireError(400, "invalid_request", f"detail is one of {', '.join(DETAILS)}", param="detail")
        spent = budget or self.budget()
        spent.take_image()
        min_pixels, max_pixels = self._pixel_range(detail, usual)
        data = await self._bytes_of(url)
        spent.take_bytes(len(data))
        opened: OpenedImage = await self._in_pool(partial(open_image, data, self.limits.max_pixels))
        spent.take_pixels(opened.num_pixels)
        wanted_pixels = max_pixels or self.limits.default_max_pixels
        image = await self._in_pool(partial(decode, opened, wanted_pixels))
        return ImagePart(image, min_pixels, max_pixels)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pixel_range(self, detail: str, usual: PixelRange) -> PixelRange:
        if detail == "low":
            return LOW_MIN_PIXELS, min(LOW_MAX_PIXELS, self.limits.default_max_pixels)
        if detail == "original":
            return None, self.limits.original_max_pixels
        if detail == "auto":
            least, most = (
                None if pixels is None else min(pixels, self.limits.original_max_pixels) for pixels in usual
            )
            return least, most
        return None, None

    async def _bytes_of(self, url: str) -> bytes:
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            return await self._in_pool(partial(read_data_url, url, self.limits.max_bytes))
        if scheme in ("http", "https"):
            return await self._fetcher.fetch(url, self.limits.max_bytes)
        raise url_rejected("its scheme is not data, http or https")

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def read_data_url(url: str, max_bytes: int) -> bytes:
    """The payload of a data: URL (RFC 2397), base64 or percent-encoded; its MIME label is not looked at.

    Raises WireError: invalid_image, image_too_large.
    """
    header, comma, payload = url.partition(",")
    if not comma:
        raise invalid_image("its data: URL has no comma")
    too_large = image_too_large(f"over {max_bytes:,} bytes", f"{max_bytes:,} bytes")
    if not _BASE64.search(header):
        if len(payload) > 3 * max_bytes:
            raise too_large
        data = unquote_to_bytes(payload)
    else:
        if len(payload) * 3 // 4 > max_bytes + max_bytes // 32 + 4:  # line breaks may add a little
            raise too_large
        data = _from_base64(payload)
    if len(data) > max_bytes:
        raise too_large
    return data


def _from_base64(payload: str) -> bytes:
    """Standard alphabet; white space, percent-encoding and missing padding are forgiven, nothing else is."""
    text = unquote_to_bytes(payload) if "%" in payload else payload.encode("utf-8", "replace")
    text = b"".join(text.split())
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise invalid_image("its base64 is not valid") from error
