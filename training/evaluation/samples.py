"""SampleBook: a few held-out prompts answered again and again while an adapter learns, the base's answer beside it.

    book = SampleBook(folder, rows, processor, num_rows=recipe.sample_rows, max_tokens=recipe.max_new_tokens)
    book.take(step, generator, adapter)          # at each evaluation

Writes ``samples.jsonl`` (one line for each step and prompt, with gold) and ``samples-<step>.png``, a sheet of pictures
and answers. Going on from a checkpoint drops the later steps' lines, which will come again.

Owns: those files, and which prompts. Does not know: when evaluations are. Place in a training run: at each evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from base.processor import Processor
from training.data.formats import Conversation
from training.durable import write_whole
from training.evaluation.answers import AnswerMemory, Progress, Respondent
from training.evaluation.questions import Question, questions_of
from training.evaluation.sheet import Panel, draw_sheet
from training.evaluation.text import plain
from training.generation import Generator

SAMPLES: Final = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt at one step."""

    step: int
    question: Question
    base: str
    adapter: str

    def as_json(self) -> dict[str, object]:
        return {
            "step": self.step, "file": self.question.origin.file, "line": self.question.origin.line,
            "question": self.question.text,
            "pictures": [picture.shown_as for picture in self.question.pictures],
            "gold": self.question.gold, "base": self.base, "adapter": self.adapter,
        }  # fmt: skip

    def panel(self) -> Panel:
        pictures = self.question.pictures
        first = pictures[0].open().image if pictures else None
        asked = (
            self.question.text if len(pictures) < 2 else f"[first of {len(pictures)}] {self.question.text}"
        )
        is_right = plain(self.adapter) == plain(self.question.gold)
        return Panel(first, asked, self.question.gold, self.base, self.adapter, is_right)


class SampleBook:
    """For one run's folder."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Conversation],
        processor: Processor,
        *,
        num_rows: int,
        max_tokens: int,
        memory: AnswerMemory | None = None,
    ) -> None:
        """Chooses the prompts: the same in every run over the same data. Raises EvaluationError without rows."""
        self._folder, self._processor, self._max_tokens = folder, processor, max_tokens
        self._questions = questions_of(rows, processor, num_rows)
        self._memory = AnswerMemory() if memory is None else memory

    @property
    def path(self) -> Path:
        return self._folder / SAMPLES

    def sheet(self, step: int) -> Path:
        return self._folder / f"samples-{step:06d}.png"

    def take(
        self, step: int, generator: Generator, adapter: Path, progress: Progress | None = None
    ) -> tuple[Sample, ...]:
        """Answer, write down and draw. Raises AdapterError."""
        respondent = Respondent(
            generator, self._processor, adapter,
            max_tokens=self._max_tokens, memory=self._memory, progress=progress,
        )  # fmt: skip
        base = self._answers(respondent, with_adapter=False)
        adapted = self._answers(respondent, with_adapter=True)
        samples = tuple(
            Sample(step, question, *answers)
            for question, *answers in zip(self._questions, base, adapted, strict=True)
        )
        self._write(step, samples)
        draw_sheet([sample.panel() for sample in samples], f"step {step}", self.sheet(step))
        return samples

    def _answers(self, respondent: Respondent, *, with_adapter: bool) -> list[str]:
        prompts = (question.prompt(self._processor) for question in self._questions)
        phase = f"{'adapter' if with_adapter else 'base'}, samples"
        return respondent.answers(phase, prompts, len(self._questions), with_adapter=with_adapter)

    def _write(self, step: int, samples: Sequence[Sample]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in before if json.loads(line)["step"] < step]
        new = [json.dumps(sample.as_json(), ensure_ascii=False) for sample in samples]
        write_whole(self.path, "".join(line + "\n" for line in [*kept, *new]))
