"""A contact sheet: pictures as thumbnails, and beside each what was asked, wanted and answered; one PNG.

Owns: the drawing. Letters beyond Latin, Greek, Cyrillic, Hebrew and Arabic show as boxes (the font that comes with
matplotlib has no others); the JSON lines beside the sheet have every text whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

WIDTH: Final = 960
THUMBNAIL: Final = 200
MARGIN: Final = 16
LINE: Final = 19
FONT_SIZE: Final = 14
MAX_LINES: Final = 6
"""Of one text; the rest is cut."""
_LABEL_WIDTH: Final = 76
_INK, _FAINT, _RIGHT, _WRONG = "#1c1c1c", "#777777", "#137333", "#a50e0e"


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One prompt."""

    picture: Image.Image | None
    question: str
    gold: str
    base: str
    adapter: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class _Line:
    label: str
    text: str
    color: str


def draw_sheet(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Write the PNG, whole or not at all."""
    blocks = [_lines(panel) for panel in panels]
    heights = [max(THUMBNAIL if panel.picture else 0, LINE * len(lines)) + 2 * MARGIN
               for panel, lines in zip(panels, blocks, strict=True)]  # fmt: skip
    sheet = Image.new("RGB", (WIDTH, 2 * MARGIN + LINE + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, _INK, _font("DejaVuSans-Bold"))
    top = 2 * MARGIN + LINE
    for panel, lines, height in zip(panels, blocks, heights, strict=True):
        draw.line((MARGIN, top, WIDTH - MARGIN, top), "#dddddd")
        _draw_panel(sheet, draw, panel, lines, top + MARGIN)
        top += height
    draft = path.with_name(f".{path.name}.draft")
    sheet.save(draft, "PNG")
    draft.replace(path)


def _draw_panel(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, lines: Sequence[_Line], top: int
) -> None:
    if panel.picture is not None:
        small = panel.picture.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        sheet.paste(small, (MARGIN, top))
    for number, line in enumerate(lines):
        y = top + number * LINE
        draw.text((2 * MARGIN + THUMBNAIL, y), line.label, _FAINT, _font("DejaVuSans"))
        draw.text((2 * MARGIN + THUMBNAIL + _LABEL_WIDTH, y), line.text, line.color, _font("DejaVuSans"))


def _lines(panel: Panel) -> list[_Line]:
    told = (
        ("asked", panel.question, _INK),
        ("gold", panel.gold, _INK),
        ("base", panel.base, _FAINT),
        ("adapter", panel.adapter, _RIGHT if panel.is_right else _WRONG),
    )
    return [
        _Line(label if number == 0 else "", text, color)
        for label, words, color in told
        for number, text in enumerate(_wrapped(words))
    ]


def _wrapped(text: str) -> list[str]:
    """In lines that fit; at most ``MAX_LINES``. A long word is cut anywhere."""
    room = WIDTH - 3 * MARGIN - THUMBNAIL - _LABEL_WIDTH
    lines: list[str] = []
    for paragraph in (text or "(nothing)").splitlines() or ["(blank)"]:
        lines += _fitted(paragraph, room)
        if len(lines) > MAX_LINES:
            return [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][:-1] + "…"]
    return lines


def _fitted(paragraph: str, room: int) -> list[str]:
    lines, rest = [], paragraph[: MAX_LINES * 200].replace("\t", "    ")
    while rest:
        size = len(rest)
        while size > 1 and _font("DejaVuSans").getlength(rest[:size]) > room:
            size = max(1, size * 9 // 10)
        cut = rest.rfind(" ", 1, size) if size < len(rest) else -1
        size = cut if cut > size // 2 else size
        lines.append(rest[:size])
        rest = rest[size:].lstrip(" ")
    return lines or [""]


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    """Of matplotlib's own fonts, which are there wherever it is installed."""
    import matplotlib

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), FONT_SIZE
    )
