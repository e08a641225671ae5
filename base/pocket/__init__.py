"""The embedded base: a few million parameters of Qwen2.5-VL, its tokenizer, and the recipe that made them.

`CHECKPOINT` is an ordinary Hugging Face folder. Nothing here is needed to load it; the recipe is kept so that
anybody can make it again (`python -m base.pocket.recipe.train`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
PICTURES: Final = Path(__file__).parent / "pictures"
