"""Images to patches, as Qwen2-VL's image processor does it, without its overhead.

Owns: the resize, normalise and patchify of the recipe. A test holds it equal to transformers' own processor.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from base.pocket.recipe.architecture import MAX_PIXELS, MIN_PIXELS

PATCH: Final = 14
MERGE: Final = 2
MEAN: Final = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD: Final = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def patch_grid(image: Image.Image) -> tuple[int, int]:
    """Patches (down, across) that `image` becomes."""
    height, width = smart_resize(image.height, image.width, PATCH * MERGE, MIN_PIXELS, MAX_PIXELS)
    return height // PATCH, width // PATCH


def patchify(image: Image.Image) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """Patches [N, 1176] float32 in merged order (2 x 2 patches together), and their grid (down, across)."""
    down, across = patch_grid(image)
    resized = image.convert("RGB").resize((across * PATCH, down * PATCH), Image.Resampling.BICUBIC)
    pixels = ((np.asarray(resized, dtype=np.float32) / 255 - MEAN) / STD).astype(np.float32)
    blocks = pixels.reshape(down // MERGE, MERGE, PATCH, across // MERGE, MERGE, PATCH, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]  # gh gw mh mw C 1 ph pw
    frames = np.broadcast_to(ordered, (*ordered.shape[:5], 2, PATCH, PATCH))
    return np.ascontiguousarray(frames).reshape(down * across, -1), (down, across)
