"""Simple pictures drawn on the spot."""

from __future__ import annotations

from PIL import Image, ImageDraw


def scene(color: str = "red", shape: str = "circle", size: tuple[int, int] = (120, 112)) -> Image.Image:
    """One filled shape off the middle of a light ground."""
    image = Image.new("RGB", size, (235, 235, 230))
    width, height = size
    box = (width // 6, height // 5, width // 6 + width // 3, height // 5 + height // 3)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=color)
    return image
