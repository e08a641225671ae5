"""Generator: who writes answers with the base and an adapter, as training knows it.

A seam: training may not import the engine, and yet an adapter is judged by what the serving engine makes of it. The
engine's ``OfflineEngine`` fits; so does a fake in the tests. `lorikeet.py` joins the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from base.model import BaseModel
from base.prompt import PromptInputs


class Generator(Protocol):
    """Greedy answers over one base. While it lives it owns the base's linears: close it before training goes on."""

    def generate(
        self,
        prompts: Sequence[PromptInputs],
        adapter: Path | None,
        *,
        max_tokens: int,
        on_answer: Callable[[], None] | None = None,
    ) -> list[tuple[int, ...]]:
        """Each prompt's answer as ids, end token excluded, in the prompts' order. ``adapter`` is a package's folder;
        None is the base. Raises AdapterError when the engine refuses the package."""
        ...

    def last_logits(self, prompt: PromptInputs, adapter: Path | None) -> Tensor:
        """[V] float32 on the CPU: what follows the prompt's last token."""
        ...

    def close(self) -> None:
        """Put the base's own linears back. Idempotent."""
        ...


GeneratorFactory = Callable[[BaseModel], Generator]
