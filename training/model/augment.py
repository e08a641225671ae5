"""Augmentation: each epoch a row's pictures look a little different, and every label stays true.

What is done, and why it is safe. A picture keeps its width and height, so the tokens of a row are those that were
counted and planned. Nothing is ever turned or mirrored: "left of" and text would become lies. Hues are never moved:
"red" would. What is left:

    ocr      light and contrast within 15 %, saturation within 20 %, a slight loss of sharpness (half the time, to 85 %
             of the size and back), JPEG noise (half the time, quality 60 to 95). Smallest strokes stay readable.
    natural  the same, and the frame: the picture is brought 8 % nearer or 10 % farther at most, about its middle, so
             that what was left of the middle stays there; margins take the picture's mean color. Coming nearer cuts
             at most 4 % off each edge: for data where the very edge matters take ``ocr``.

Boxes and points (``"bbox_2d": [left, top, right, bottom]``, ``"point_2d": [x, y]``) move with their picture: such a row
shrinks towards the upper left corner, to 85 % at most, all its pictures alike. That is the one change of frame that
means the same in the picture's own pixels and in those that the base sees, so no guess is made at which of the two a
data set counts in. A row with coordinates in any other spelling keeps its frame.

Deterministic in (seed, epoch, row). Does not know: tokens, batches. Place in a training run: under the collator.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

from PIL import Image, ImageEnhance, ImageStat

from base.prompt import ImagePart, TextPart
from training.data.formats.conversation import Conversation, Turn
from training.data.formats.pictures import PictureRef
from training.recipe.recipe import Augmentation

Augment = Callable[[Conversation, int, int, int], Conversation]
"""(row, seed, epoch, row's index) -> the row to train on in that epoch."""

PLACES: Final = re.compile(r'("(?:bbox|point)_2d"\s*:\s*\[)([-\d.,\s]*)(\])')
"""As Qwen2.5-VL writes boxes and points."""
COORDINATES: Final = re.compile(r"_2d\b|\d\s*,\s*-?\d+(?:\.\d+)?\s*[\])>]|<(?:box|loc|point)")
"""What may be a place in a picture, in whichever spelling."""
LEAST_SHRINK: Final = 0.85
FARTHEST: Final = 0.9
NEAREST: Final = 1.08


@dataclass(frozen=True, slots=True)
class Look:
    """What happens to one picture. Factors of 1 and edges of 0 change nothing."""

    light: float
    contrast: float
    saturation: float
    sharpness: float
    """Size that it is brought to, and back from, as a share of its own."""
    jpeg_quality: int | None
    zoom: float = 1.0
    """Above 1 nearer, below farther."""
    is_about_corner: bool = False
    """Whether the upper left corner stays where it is, rather than the middle."""

    def of(self, image: Image.Image) -> Image.Image:
        """A new RGB picture of the same width and height."""
        picture = _zoomed(image.convert("RGB"), self.zoom, self.is_about_corner)
        picture = _softened(picture, self.sharpness)
        for enhance, factor in (
            (ImageEnhance.Brightness, self.light),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            picture = enhance(picture).enhance(factor)
        return picture if self.jpeg_quality is None else _through_jpeg(picture, self.jpeg_quality)


@dataclass(frozen=True, slots=True)
class LookedAt(PictureRef):
    """A picture that opens with a look."""

    look: Look | None = None

    def open(self) -> ImagePart:
        part = PictureRef.open(self)
        return part if self.look is None else replace(part, image=self.look.of(part.image))


def augmentation(name: Augmentation) -> Augment:
    """What a recipe's ``augment`` means."""
    return _AUGMENTS[name]


def no_augment(row: Conversation, seed: int, epoch: int, row_index: int) -> Conversation:
    """The row itself."""
    return row


def augment_ocr(row: Conversation, seed: int, epoch: int, row_index: int) -> Conversation:
    """Light, sharpness and noise."""
    chance = _chance(seed, epoch, row_index)
    return _with_pictures(row, lambda: _photometric(chance))


def augment_natural(row: Conversation, seed: int, epoch: int, row_index: int) -> Conversation:
    """The same, and the frame."""
    chance = _chance(seed, epoch, row_index)
    text = "\n".join(turn.text for turn in row.turns)
    if COORDINATES.search(PLACES.sub("", text)):
        return _with_pictures(row, lambda: _photometric(chance))
    if not PLACES.search(text):
        return _with_pictures(
            row, lambda: replace(_photometric(chance), zoom=chance.uniform(FARTHEST, NEAREST))
        )
    shrink = round(chance.uniform(LEAST_SHRINK, 1.0), 4)
    seen = _with_pictures(row, lambda: replace(_photometric(chance), zoom=shrink, is_about_corner=True))
    return replace(seen, turns=tuple(_with_places(turn, shrink) for turn in seen.turns))


_AUGMENTS: Final[Mapping[Augmentation, Augment]] = {
    "none": no_augment,
    "ocr": augment_ocr,
    "natural": augment_natural,
}


def _chance(seed: int, epoch: int, row_index: int) -> random.Random:
    return random.Random(f"{seed} {epoch} {row_index}")  # text is seeded by its SHA-512: the same everywhere


def _photometric(chance: random.Random) -> Look:
    return Look(
        light=chance.uniform(0.85, 1.15),
        contrast=chance.uniform(0.85, 1.15),
        saturation=chance.uniform(0.8, 1.2),
        sharpness=chance.choice((1.0, chance.uniform(0.85, 1.0))),
        jpeg_quality=chance.choice((None, chance.randint(60, 95))),
    )


# ---- rows ------------------------------------------------------------------------------------------------------


def _with_pictures(row: Conversation, draw: Callable[[], Look]) -> Conversation:
    """The row, each picture with a look of its own."""

    def seen(part: TextPart | PictureRef) -> TextPart | PictureRef:
        if isinstance(part, TextPart):
            return part
        return LookedAt(**{field.name: getattr(part, field.name) for field in fields(part)}, look=draw())

    turns = tuple(replace(turn, parts=tuple(seen(part) for part in turn.parts)) for turn in row.turns)
    return replace(row, turns=turns)


def _with_places(turn: Turn, shrink: float) -> Turn:
    """A turn's boxes and points, drawn in by ``shrink`` towards the upper left corner."""

    def moved(found: re.Match[str]) -> str:
        edges = ", ".join(_scaled(edge.strip(), shrink) for edge in found[2].split(","))
        return f"{found[1]}{edges}{found[3]}"

    parts = tuple(
        TextPart(PLACES.sub(moved, part.text)) if isinstance(part, TextPart) else part for part in turn.parts
    )
    return replace(turn, parts=parts)


def _scaled(edge: str, shrink: float) -> str:
    """A coordinate, whole numbers staying whole, decimals as many as they were."""
    decimals = len(edge.partition(".")[2])
    return f"{float(edge) * shrink:.{decimals}f}"


# ---- pictures --------------------------------------------------------------------------------------------------


def _zoomed(image: Image.Image, zoom: float, is_about_corner: bool) -> Image.Image:
    """On a sheet of its own size."""
    size = _share(image, min(zoom, 1.0))
    if zoom > 1:
        edge = (1 - 1 / zoom) / 2
        box = tuple(side * share for share in (edge, 1 - edge) for side in image.size)
        return image.resize(image.size, Image.Resampling.BICUBIC, box=(box[0], box[1], box[2], box[3]))
    if size == image.size:
        return image
    sheet = Image.new("RGB", image.size, tuple(round(mean) for mean in ImageStat.Stat(image).mean))
    corner = (0, 0) if is_about_corner else ((image.width - size[0]) // 2, (image.height - size[1]) // 2)
    sheet.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    return sheet


def _softened(image: Image.Image, share: float) -> Image.Image:
    size = _share(image, share)
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BICUBIC)


def _share(image: Image.Image, share: float) -> tuple[int, int]:
    return max(1, round(image.width * share)), max(1, round(image.height * share))


def _through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as decoded:
        return decoded.convert("RGB")
