"""hold_out: some of the rows kept back for the evaluation, where no file of its own is given.

Owns: which rows. The choice depends on what is asked alone, not on order, seed or answer, and rows that ask the same
stay together: nothing that is trained on is ever asked. Does not know: files, tokens. Place in a training run: after
the check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from training.data.formats import Conversation


def hold_out(
    rows: Sequence[Conversation], share: float
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """(rows to train on, rows held out), both in the given order; the latter are at least ``share`` of all, but one
    question always stays to be trained on. So none is held out if all rows ask the same."""
    questions: dict[str, int] = {}
    asked = [row.question_digest() for row in rows]
    for question in asked:
        questions[question] = questions.get(question, 0) + 1
    held: set[str] = set()
    missing = share * len(rows)
    for question in sorted(questions, key=_draw)[: len(questions) - 1]:
        if missing <= 0:
            break
        held.add(question)
        missing -= questions[question]
    return (
        tuple(row for row, question in zip(rows, asked, strict=True) if question not in held),
        tuple(row for row, question in zip(rows, asked, strict=True) if question in held),
    )


def _draw(question: str) -> str:
    """A digest of the digest: an order that nothing else depends on."""
    return hashlib.sha256(f"held out {question}".encode()).hexdigest()
