"""PictureRef: a picture that a row names, opened only when it is needed; and PictureRoot, which says what may be named.

Owns: paths under one root, data: URLs, decoding. Pixels come out exactly as the server's own decoding gives them, so
that an adapter is trained on what it will be served (a test compares the two). Does not know: rows, formats, models.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

from PIL import Image

from base.decode import decode, orientation
from base.prompt import ImagePart
from training.data.faults import FaultKind, Found, RowRejected

DEFAULT_MAX_PIXELS: Final = 16_777_216
"""Of one picture before resizing; the server's default, so that what trains can be served."""
DETAILS: Final = ("auto", "low", "high")
LOW_MIN_PIXELS: Final = 4 * 28 * 28
LOW_MAX_PIXELS: Final = 64 * 28 * 28
"""``detail: low`` as the server understands it."""
MAX_SIDE: Final = 65_535  # JPEG's own limit
MAX_ASPECT_RATIO: Final = 200  # of base.images, which would bring transformers along
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")


@dataclass(frozen=True, slots=True)
class PictureRef:
    """One picture, by path or by its bytes."""

    shown_as: str = field(compare=False)
    """How a report names it."""
    path: Path | None
    data: bytes | None = field(default=None, repr=False)
    detail: str = "auto"
    base_max_pixels: int = DEFAULT_MAX_PIXELS
    """What the base resizes to: a far larger JPEG is decoded at a fraction of its size, as the server does."""
    max_pixels: int = DEFAULT_MAX_PIXELS

    def read(self) -> bytes:
        """Raises RowRejected: image_missing."""
        if self.path is None:
            return self.data or b""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise self._missing(error) from error

    def _missing(self, error: OSError) -> RowRejected:
        return RowRejected(
            FaultKind.IMAGE_MISSING,
            "",
            self.shown_as,
            "a file that can be read",
            f"check it: {error.strerror}",
        )

    def digest(self) -> str:
        """Hex SHA-256 of its encoded bytes. Raises RowRejected: image_missing."""
        if self.path is None:
            return hashlib.sha256(self.data or b"").hexdigest()
        try:
            stat = self.path.stat()
        except OSError as error:
            raise self._missing(error) from error
        return _file_digest(self, stat.st_mtime_ns, stat.st_size)

    def size(self) -> tuple[int, int]:
        """Width and height when upright, from the header alone. Raises RowRejected."""
        return self._upright_size(self._header(self.read()))

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """Least and most pixels after resizing; None leaves the base's own."""
        return (
            (LOW_MIN_PIXELS, min(LOW_MAX_PIXELS, self.base_max_pixels))
            if self.detail == "low"
            else (None, None)
        )

    def open(self) -> ImagePart:
        """Decode it. Raises RowRejected."""
        least, most = self.limits
        return ImagePart(self._decode(self._header(self.read()), most or self.base_max_pixels), least, most)

    def _header(self, data: bytes) -> Image.Image:
        """Opened, judged by its size, not yet decoded."""
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise self._bomb("far too many pixels") from error
        except Exception as error:  # a decoder may raise anything at hostile bytes
            raise self._undecodable("its header is damaged, or it is none of these") from error
        width, height = image.size
        if width * height > self.max_pixels or max(width, height) > MAX_SIDE:
            raise self._bomb(f"{width} x {height} pixels")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise RowRejected(
                FaultKind.IMAGE_TOO_EXTREME, "", Found(f"{self.shown_as}, {width} x {height}"),
                f"a side at most {MAX_ASPECT_RATIO} times the other", "crop it or pad it",
            )  # fmt: skip
        return image

    def _upright_size(self, image: Image.Image) -> tuple[int, int]:
        return (image.height, image.width) if orientation(image) >= 5 else image.size

    def _decode(self, image: Image.Image, wanted_pixels: int) -> Image.Image:
        try:
            return decode(image, wanted_pixels)
        except Exception as error:  # a decoder may raise anything at hostile bytes
            raise self._undecodable("it is damaged or cut short") from error

    def _undecodable(self, why: str) -> RowRejected:
        return RowRejected(
            FaultKind.IMAGE_UNDECODABLE, "", Found(f"{self.shown_as} ({why})"), "a whole PNG, JPEG, WebP or GIF",
            "save it again in one of these formats, or remove the row",
        )  # fmt: skip

    def _bomb(self, what: str) -> RowRejected:
        return RowRejected(
            FaultKind.IMAGE_BOMB,
            "",
            Found(f"{self.shown_as}, {what}"),
            f"at most {self.max_pixels:,} pixels",
            "shrink it",
        )


@dataclass(frozen=True, slots=True)
class PictureRoot:
    """The folder that pictures may lie in; nothing outside is opened, symbolic links followed."""

    folder: Path
    base_max_pixels: int = DEFAULT_MAX_PIXELS
    max_pixels: int = DEFAULT_MAX_PIXELS

    def refer(self, value: object, field: str, detail: str = "auto") -> PictureRef:
        """What ``value`` of a row names: a path, a data: URL, or a table's {path, bytes}. Raises RowRejected."""
        if detail not in DETAILS:
            raise RowRejected(
                FaultKind.BAD_VALUE, f"{field}.detail", detail, f"one of {', '.join(DETAILS)}", "use auto"
            )
        if isinstance(value, Mapping):
            data, path = value.get("bytes"), value.get("path") or value.get("url")
            if isinstance(data, bytes):
                return self._ref(str(path or "its bytes"), None, data, detail)
            value = path
        if not isinstance(value, str) or not value.strip():
            raise RowRejected(
                FaultKind.BAD_VALUE, field, value, "a path or a data: URL", "name a picture, or leave it out"
            )
        if value[:5].lower() == "data:":
            return self._ref(value[:32] + "…", None, _payload(value, field), detail)
        if value[:8].lower().startswith(("http://", "https://")):
            raise RowRejected(
                FaultKind.IMAGE_REMOTE, field, value, "a path under the data root or a data: URL",
                "download it and give its path: training fetches nothing",
            )  # fmt: skip
        return self._ref(value, self._path(value, field), None, detail)

    def _ref(self, shown_as: str, path: Path | None, data: bytes | None, detail: str) -> PictureRef:
        return PictureRef(shown_as, path, data, detail, self.base_max_pixels, self.max_pixels)

    def _path(self, value: str, field: str) -> Path:
        root = self.folder.resolve()
        try:
            path = (root / value.removeprefix("file://")).resolve()
            is_file = path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links, a name too long
            raise RowRejected(
                FaultKind.IMAGE_MISSING, field, value, "a path", "name an existing file under the data root"
            ) from error
        if not path.is_relative_to(root):
            raise RowRejected(
                FaultKind.IMAGE_OUTSIDE_ROOT, field, value, "a path under the data root",
                "move the picture there, or set the data root to a folder that holds all of them",
            )  # fmt: skip
        if not is_file:
            raise RowRejected(
                FaultKind.IMAGE_MISSING, field, value, "an existing file under the data root",
                "check the name; paths are relative to the data root, by default the data file's folder",
            )  # fmt: skip
        return path


@lru_cache(100_000)
def _file_digest(picture: PictureRef, modified_ns: int, num_bytes: int) -> str:
    """Of a file as it was at that time: rows share pictures, and each is asked for more than once."""
    return hashlib.sha256(picture.read()).hexdigest()


def _payload(url: str, field: str) -> bytes:
    """The bytes of a data: URL (RFC 2397)."""
    header, comma, payload = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if not header.rstrip().lower().endswith("base64"):
            return unquote_to_bytes(payload)
        text = b"".join((unquote_to_bytes(payload) if "%" in payload else payload.encode()).split())
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise RowRejected(
            FaultKind.IMAGE_UNDECODABLE,
            field,
            url,
            "data:image/png;base64,…",
            "encode the picture's bytes again",
        ) from error
