"""The values that go into the processor and come out of it. No behaviour, no tokenizer, no model.

Place in a request's way: step 3; the server builds messages, the engine carries ``PromptInputs``.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

Grid = tuple[int, int, int]
"""An image's patches: (time, height, width), before merging."""


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    image: Image.Image
    """Already decoded and turned the right way up; converted to RGB if it is not."""
    min_pixels: int | None = None
    """Overrides the base's smallest area after resizing, for this image alone."""
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON text, as on the wire."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    parts: tuple[TextPart | ImagePart, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PromptImage:
    """One image made into patches, and where its tokens lie in the prompt."""

    pixels: Tensor  # [P, patch_dim] float32, on the CPU
    grid: Grid
    digest: str
    """Hex SHA-256 of the grid and the pixels: equal digests mean equal embeddings under equal vision weights."""
    offset: int
    """Index of its first token in the prompt's ids."""
    num_tokens: int
    """P / merge_size**2."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptInputs:
    """A prompt ready for the engine."""

    ids: tuple[int, ...]  # T
    images: tuple[PromptImage, ...]
    positions: Tensor  # [3, T] int64, on the CPU: time, height, width
    rope_delta: int
    """The token after the prompt has position T + rope_delta on all three axes; so do all later ones."""
