"""FixedAnswers: a Generator that always says the same, for tests in which what an adapter answers does not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from base.model import BaseModel
from base.prompt import PromptInputs


class FixedAnswers:
    """``text`` to every prompt; the logits rise with the id."""

    def __init__(self, base: BaseModel, text: str = "") -> None:
        self._ids = tuple(base.processor.encode(text))
        self._vocab_size = base.spec.vocab_size

    def generate(
        self,
        prompts: Sequence[PromptInputs],
        adapter: Path | None,
        *,
        max_tokens: int,
        on_answer: Callable[[], None] | None = None,
    ) -> list[tuple[int, ...]]:
        return [self._ids for _ in prompts]

    def last_logits(self, prompt: PromptInputs, adapter: Path | None) -> Tensor:
        return torch.arange(self._vocab_size, dtype=torch.float32)

    def close(self) -> None:
        pass
