"""Pictures for tests: repeatable noise with large structure, so that no two of them look alike to a model."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(seed: int, width: int, height: int) -> Image.Image:
    """An RGB picture; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
