"""ImagePreparer: one picture to patches, by transformers' PIL image processor and the checkpoint's settings.

Owns: pixel limits, and the digest that names an image's content. Does not know: tokens, messages, models, how a
picture was fetched or decoded. Immutable. Place in a request's way: step 3, under the processor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from base.errors import InvalidImage
from base.prompt import Grid, ImagePart

MAX_ASPECT_RATIO: Final = 200  # of transformers' smart_resize


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image made into patches, not yet placed in a prompt."""

    pixels: Tensor  # [P, patch_dim] float32
    grid: Grid
    digest: str
    num_tokens: int


class ImagePreparer:
    """The checkpoint's image processing, with this server's limits."""

    def __init__(self, folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Reads ``preprocessor_config.json``; ``min_pixels`` and ``max_pixels`` override its limits."""
        self._process: Final[Callable[..., object]] = _load(folder)
        self.patch_size: Final = int(self._attribute("patch_size"))
        self.merge_size: Final = int(self._attribute("merge_size"))
        size = dict(getattr(self._process, "size"))  # noqa: B009 (untyped)
        self.max_pixels: Final = int(max_pixels or size["longest_edge"])
        self.min_pixels: Final = min(int(min_pixels or size["shortest_edge"]), self.max_pixels)

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def prepare(self, part: ImagePart) -> PreparedImage:
        """Resize within the limits and cut into patches. Raises InvalidImage."""
        image = part.image if part.image.mode == "RGB" else part.image.convert("RGB")
        _check_size(image.width, image.height)
        output = self._process(images=[image], size=self._limits(part), return_tensors="np")
        pixels, grid = np.asarray(output["pixel_values"], np.float32), output["image_grid_thw"][0]  # type: ignore[index]
        t, h, w = (int(size) for size in grid)
        return PreparedImage(
            pixels=torch.from_numpy(np.ascontiguousarray(pixels)),
            grid=(t, h, w),
            digest=_digest((t, h, w), pixels),
            num_tokens=t * h * w // self.merge_size**2,
        )

    def resized(
        self, width: int, height: int, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[int, int]:
        """Width and height that ``prepare`` would resize such a picture to; the limits as in ImagePart."""
        _check_size(width, height)
        most = max_pixels or self.max_pixels
        least = min(min_pixels or self.min_pixels, most)
        tall, wide = smart_resize(height, width, self.factor, least, most)
        return int(wide), int(tall)

    def _limits(self, part: ImagePart) -> dict[str, int]:
        longest = part.max_pixels or self.max_pixels
        return {"shortest_edge": min(part.min_pixels or self.min_pixels, longest), "longest_edge": longest}

    def _attribute(self, name: str) -> int:
        value: int = getattr(self._process, name)
        return value


def _load(folder: Path) -> Callable[..., object]:
    processor: Callable[..., object] = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return processor


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise InvalidImage("an image has no pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InvalidImage(
            f"an image of {width} x {height} is longer than {MAX_ASPECT_RATIO} times its width: crop it or pad it"
        )


def _digest(grid: Grid, pixels: np.ndarray) -> str:
    digest = hashlib.sha256(repr(grid).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
