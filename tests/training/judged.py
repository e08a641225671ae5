"""Held-out rows with plain pictures of one colour each, and a Generator that answers by what it is told to."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from base.processor import ImagePart, Processor, PromptInputs
from training.data.formats import Conversation, DataFile, PictureRoot
from training.data.formats.pictures import PictureRef

COLORS: Final = ("red", "green", "blue", "yellow")
ADAPTER: Final = Path("an-adapter")


def plain_picture(color: str, size: tuple[int, int] = (56, 56)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def color_rows(folder: Path, processor: Processor, num_rows: int = 8) -> list[Conversation]:
    """Each asks for the colour of its picture."""
    rows = []
    for number in range(num_rows):
        color = COLORS[number % len(COLORS)]
        (folder / f"{number}.png").write_bytes(plain_picture(color, (56 + number, 56)))
        rows.append(
            {"query": f"Colour {number}?", "response": f"It is {color}.", "images": [f"{number}.png"]}
        )
    return read(folder, rows, processor)


def text_rows(folder: Path, processor: Processor, num_rows: int = 6) -> list[Conversation]:
    rows = [{"prompt": f"say {number}", "completion": f"number {number}"} for number in range(num_rows)]
    return read(folder, rows, processor)


def read(folder: Path, rows: Sequence[object], processor: Processor) -> list[Conversation]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(DataFile(path, root=PictureRoot(folder, base_max_pixels=processor.images.max_pixels)))
    wrong = [str(row) for row in found if not isinstance(row, Conversation)]
    if wrong:
        raise AssertionError(wrong)
    return [row for row in found if isinstance(row, Conversation)]


class ScriptedGenerator:
    """Answers with ``base(prompt)`` and ``adapter(prompt)``; keeps what it was asked."""

    def __init__(
        self,
        processor: Processor,
        base: Callable[[PromptInputs], str],
        adapter: Callable[[PromptInputs], str],
    ) -> None:
        self._processor, self._say = processor, {False: base, True: adapter}
        self.asked: list[tuple[int, bool]] = []
        """Number of prompts of each call, and whether of the adapter."""
        self.max_tokens: list[int] = []
        self.is_open = False
        self.num_closed = 0

    def generate(
        self,
        prompts: Sequence[PromptInputs],
        adapter: Path | None,
        *,
        max_tokens: int,
        on_answer: Callable[[], None] | None = None,
    ) -> list[tuple[int, ...]]:
        self.asked.append((len(prompts), adapter is not None))
        self.max_tokens.append(max_tokens)
        for _ in prompts:
            if on_answer is not None:
                on_answer()
        say = self._say[adapter is not None]
        return [tuple(self._processor.encode(say(prompt))) for prompt in prompts]

    def last_logits(self, prompt: PromptInputs, adapter: Path | None) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.0]) if adapter is None else torch.tensor([0.0, 0.0, 0.0])

    def close(self) -> None:
        self.is_open = False
        self.num_closed += 1

    def opened(self) -> AbstractContextManager[ScriptedGenerator]:
        self.is_open = True
        return closing(self)

    def num_asked(self, with_adapter: bool) -> int:
        return sum(count for count, of_adapter in self.asked if of_adapter == with_adapter)


def seeing(rows: Sequence[Conversation], processor: Processor) -> Callable[[PromptInputs], str]:
    """Says the colour of any of the rows' pictures, and that there is none of others."""
    known = {_digest(row.pictures[0], processor): row.turns[-1].text for row in rows}
    return lambda prompt: known.get(prompt.images[0].digest, "nothing") if prompt.images else "hello"


def _digest(picture: PictureRef, processor: Processor) -> str:
    part: ImagePart = picture.open()
    return processor.images.prepare(part).digest


def always(answer: str) -> Callable[[PromptInputs], str]:
    return lambda _: answer
