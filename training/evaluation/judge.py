"""evaluate: one adapter judged beside the base, on the same held-out rows, by the answers that the server would give.

    rules = check_judging(judging, rows, has_loss=True)                        # before training; raises GateError
    verdict = evaluate(open_generator, processor, rows, adapter, judging, losses=losses, memory=memory)
    verdict.passed, verdict.text(), verdict.write(folder)                      # scores.json, scores.md, answers.jsonl

``open_generator`` gives a context that yields a Generator and closes it, such as
``lambda: closing(OfflineEngine(base))``. Losses are computed before it is opened, because a Generator owns the base's
linears while it lives. ``losses`` is ``loss.HeldOutLoss`` over an AdaptedBase, or anything that fits
``(rows, with_adapter) -> nats per label``; without it there is no ``loss`` and no rule may name it. ``memory`` keeps
the base's answers from one call to the next, over the same base.

Owns: what is judged and in which order. Does not know: how answers are generated or losses computed, what becomes of
an adapter that fails. Place in a training run: after training, before the package; and all of ``adapters eval``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from base.processor import Processor
from training.data.formats import Conversation
from training.evaluation.answers import AnswerMemory, Progress, Respondent
from training.evaluation.catalogue import chosen_metrics, expected_numbers
from training.evaluation.gate import Rule, check_gate, hold
from training.evaluation.general import PLAIN_PROMPTS, general_ability, general_prompts
from training.evaluation.loss import Losses
from training.evaluation.metrics import row_scores, scores
from training.evaluation.questions import Question, questions_of
from training.evaluation.verdict import JudgedAnswer, Verdict
from training.evaluation.vision import VisionDependence, vision_dependence
from training.generation import Generator
from training.recipe.recipe import Recipe

logger = logging.getLogger("lorikeet.training")
OpenGenerator = Callable[[], AbstractContextManager[Generator]]
VISION_ROWS = 64
"""Most rows that vision dependence asks about: three answers each, of both models."""


@dataclass(frozen=True, slots=True)
class Judging:
    """What is computed and what must hold."""

    metrics: tuple[str, ...] = ()
    """Of answers; empty is ``catalogue.DEFAULT_METRICS``."""
    gate: tuple[str, ...] = ()
    max_rows: int = 200
    """Rows that answers are generated for, at most; the loss is of all."""
    vision_rows: int = VISION_ROWS
    """Of those, rows with pictures that vision dependence is computed on, at most."""
    max_tokens: int = 256
    """Of an answer."""
    general: tuple[str, ...] = PLAIN_PROMPTS
    """Prompts for general ability; empty leaves it out."""

    @classmethod
    def of(cls, recipe: Recipe, base_name: str) -> Judging:
        """As the recipe says; ``base_name`` is ``BaseSpec.name``."""
        return cls(
            metrics=recipe.metrics, gate=recipe.gate, max_rows=recipe.eval_rows, max_tokens=recipe.max_new_tokens,
            general=general_prompts(base_name),
        )  # fmt: skip


def check_judging(judging: Judging, rows: Sequence[Conversation], *, has_loss: bool) -> tuple[Rule, ...]:
    """The gate's rules, read, once it is sure that every number they name will be there. To be called before training.

    Raises MetricError for an unknown metric, GateError for rules that cannot be read or held.
    """
    numbers = expected_numbers(
        judging.metrics,
        has_rows=bool(rows),
        has_pictures=judging.vision_rows > 0 and _will_see(rows, judging.max_rows),
        has_loss=has_loss,
        has_general=bool(judging.general),
    )
    return check_gate(judging.gate, numbers)


def evaluate(
    open_generator: OpenGenerator,
    processor: Processor,
    rows: Sequence[Conversation],
    adapter: Path,
    judging: Judging,
    *,
    losses: Losses | None = None,
    memory: AnswerMemory | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Judge the adapter in the folder ``adapter``. Raises EvaluationError without rows, AdapterError when the generator
    refuses the adapter, RowRejected for a picture that can no longer be opened, and what ``check_judging`` raises."""
    started = time.monotonic()
    rules = check_judging(judging, rows, has_loss=losses is not None)
    questions = questions_of(rows, processor, judging.max_rows)
    of_adapter, of_base = _losses(losses, rows)
    with open_generator() as generator:
        respondent = Respondent(
            generator, processor, adapter, max_tokens=judging.max_tokens, memory=memory, progress=progress
        )
        answers = _answered(questions, respondent, chosen_metrics(judging.metrics))
        vision = _vision(questions, respondent, judging.vision_rows)
        general = general_ability(judging.general, respondent)
    of_adapter |= _of_set(judging, [answer.adapter for answer in answers], questions)
    of_base |= _of_set(judging, [answer.base for answer in answers], questions)
    if vision:
        of_adapter |= vision["adapter"].scores()
        of_base |= vision["base"].scores()
    of_adapter |= general.scores() if general else {}
    gate = hold(rules, of_adapter, of_base)
    seconds = time.monotonic() - started
    logger.info("evaluation.done rows=%d passed=%s seconds=%.1f", len(answers), gate.passed, seconds)
    return Verdict(of_adapter, of_base, gate, len(rows), answers, vision, general, seconds)


def _will_see(rows: Sequence[Conversation], most: int) -> bool:
    """Whether a judged row shows pictures before its judged answer."""
    chosen = sorted(rows, key=Conversation.digest)[:most] if len(rows) > most else rows
    return any(turn.pictures for row in chosen for turn in row.turns[: _last_trained(row)])


def _last_trained(row: Conversation) -> int:
    return max((index for index, turn in enumerate(row.turns) if turn.is_trained), default=0)


def _losses(losses: Losses | None, rows: Sequence[Conversation]) -> tuple[dict[str, float], dict[str, float]]:
    if losses is None:
        return {}, {}
    return {"loss": losses(rows, True)}, {"loss": losses(rows, False)}


def _answered(
    questions: Sequence[Question], respondent: Respondent, metrics: Sequence[str]
) -> tuple[JudgedAnswer, ...]:
    base, adapter = (
        respondent.answers(
            f"{who}, held-out rows",
            (question.prompt(respondent.processor) for question in questions),
            len(questions),
            with_adapter=who == "adapter",
        )
        for who in ("base", "adapter")
    )
    return tuple(
        judged_answer(question, said, better, metrics)
        for question, said, better in zip(questions, base, adapter, strict=True)
    )


def judged_answer(question: Question, base: str, adapter: str, metrics: Sequence[str]) -> JudgedAnswer:
    """One question with both answers and their scores."""
    return JudgedAnswer(
        question.origin,
        question.text,
        tuple(picture.shown_as for picture in question.pictures),
        question.gold,
        base,
        adapter,
        row_scores(metrics, base, question.gold),
        row_scores(metrics, adapter, question.gold),
    )


def _of_set(judging: Judging, answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    return scores(chosen_metrics(judging.metrics), answers, [question.gold for question in questions])


def _vision(questions: Sequence[Question], respondent: Respondent, most: int) -> dict[str, VisionDependence]:
    found = {
        who: vision_dependence(questions, respondent, with_adapter=who == "adapter", most=most)
        for who in ("adapter", "base")
    }
    return {who: dependence for who, dependence in found.items() if dependence is not None}
