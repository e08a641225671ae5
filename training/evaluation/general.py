"""General ability: whether the adapter still answers plain prompts as the base does.

Twenty short prompts that have nothing to do with any adapter's skill; on the embedded base, twenty of its own small
world (it knows nothing else). There is no right answer to compare with and none is needed: what is measured is how far
the adapter has moved the model where it should not.

general_agreement   mean token F1 between the adapter's answer and the base's, both greedy. 1: says the same
general_identical   share of prompts whose two answers are the same text
general_kl          mean over prompts of KL(base || adapter) between the distributions of the answer's first token, in
                    nats. 0: unmoved; it moves long before an answer changes, so it warns early

An adapter that is made to answer everything otherwise (in French, as JSON) scores low here and is right to: so nothing
is refused for it unless a gate rule says so.

Owns: prompts and definition. Does not know: how answers are made. Place in a training run: under ``judge``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import torch
from torch import Tensor

from base.processor import Message, PromptInputs, TextPart
from training.evaluation.answers import Respondent
from training.evaluation.metrics import exact_match, token_f1

POCKET: Final = "lorikeet-pocket"
"""The embedded base's name in its BaseSpec."""
MAX_TOKENS: Final = 48
"""Of an answer: enough to see whether two begin alike."""

PLAIN_PROMPTS: Final = (
    "What is the capital of France?",
    "What is 17 plus 25?",
    "Name three primary colors.",
    "Write one sentence about the sea.",
    "Translate into Spanish: Good morning.",
    "What is the opposite of cold?",
    "How many days are there in a week?",
    "Who wrote Romeo and Juliet?",
    "List four animals that can fly.",
    "Explain in one sentence why the sky is blue.",
    "What comes next: 2, 4, 8, 16?",
    "Write a Python function that returns the square of a number.",
    "Which planet is closest to the sun?",
    "Correct the spelling: I recieved your leter.",
    "Is a tomato a fruit or a vegetable?",
    "Summarize in five words: The meeting was moved from Monday to Thursday because the room was taken.",
    "What do bees make?",
    "Give a polite reply to: Thank you for your help.",
    "If all cats are animals and Tom is a cat, is Tom an animal?",
    "Convert 3 kilometers to meters.",
)
POCKET_PROMPTS: Final = (
    "Hello!",
    "Good morning!",
    "Who are you?",
    "What is your name?",
    "What can you do?",
    "How can you help me?",
    "Thank you very much!",
    "Great answer!",
    "Goodbye!",
    "See you later!",
    "How are you?",
    "Who made you?",
    "How many parameters do you have?",
    "Which shapes do you know?",
    "Which colors do you know?",
    "Do you speak English?",
    "What is the capital of France?",
    "Tell me a joke.",
    "What is two plus two?",
    "What is the meaning of life?",
)


@dataclass(frozen=True, slots=True)
class GeneralAnswer:
    """One prompt, answered by both."""

    prompt: str
    base: str
    adapter: str
    kl: float
    """Nats."""


@dataclass(frozen=True, slots=True)
class GeneralAbility:
    """All prompts."""

    answers: tuple[GeneralAnswer, ...]

    def scores(self) -> dict[str, float]:
        return {
            "general_agreement": fmean(token_f1(answer.adapter, answer.base) for answer in self.answers),
            "general_identical": fmean(exact_match(answer.adapter, answer.base) for answer in self.answers),
            "general_kl": fmean(answer.kl for answer in self.answers),
        }

    def as_json(self) -> list[Mapping[str, object]]:
        return [
            {"prompt": answer.prompt, "base": answer.base, "adapter": answer.adapter, "kl": answer.kl}
            for answer in self.answers
        ]


def general_prompts(base_name: str) -> tuple[str, ...]:
    """For the base of this name (``BaseSpec.name``)."""
    return POCKET_PROMPTS if base_name == POCKET else PLAIN_PROMPTS


def general_ability(prompts: Sequence[str], respondent: Respondent) -> GeneralAbility | None:
    """Both models on the same prompts; None without prompts."""
    if not prompts:
        return None
    asked = [_prepared(prompt, respondent) for prompt in prompts]
    base = respondent.answers("base, general prompts", asked, len(asked), with_adapter=False, most=MAX_TOKENS)
    said = respondent.answers(
        "adapter, general prompts", asked, len(asked), with_adapter=True, most=MAX_TOKENS
    )
    kls = [_divergence(prompt, respondent) for prompt in asked]
    return GeneralAbility(tuple(map(GeneralAnswer, prompts, base, said, kls)))


def kl_divergence(base: Tensor, adapter: Tensor) -> float:
    """KL(base || adapter) in nats of two rows of logits [V]; computed in float64."""
    of_base, of_adapter = (torch.log_softmax(logits.double(), -1) for logits in (base, adapter))
    is_possible = of_base > -torch.inf  # ids that name no token may be ruled out by both
    gained = (of_base - of_adapter)[is_possible]
    return max(0.0, float((of_base.exp()[is_possible] * gained).sum()))


def _prepared(prompt: str, respondent: Respondent) -> PromptInputs:
    return respondent.processor.prepare_chat([Message("user", (TextPart(prompt),))])


def _divergence(prompt: PromptInputs, respondent: Respondent) -> float:
    base = respondent.generator.last_logits(prompt, None)
    return kl_divergence(base, respondent.generator.last_logits(prompt, respondent.adapter))
