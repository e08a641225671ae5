"""Vision dependence: how much of the score comes from looking.

An adapter can learn what answers are likely and never look at a picture; its score on held-out rows may still be high.
So each row with pictures is asked three times: with its true pictures, with blank ones (plain grey of the same sizes),
and with swapped ones (each picture replaced by another row's of like size). With s the mean score against the row's own
gold answer:

    vision_dependence = s(true) - max(s(blank), s(swapped))

Zero: the pictures are not used (or misused). Near s(true): without the right picture nothing is left. Below zero: true
pictures do harm. s is token F1, which gives part of an answer its part, so long answers count too; the same with exact
match is ``vision_dependence_exact``. Both are given for the base beside the adapter.

A picture is swapped for one of other content from another row, if possible of another gold answer (a swap that changes
nothing proves nothing), of those for the nearest in size, and of those for the one that the two rows' digests choose,
so that it is the same each time. Data with one picture alone has no swapped score, data without pictures none at all.

Owns: this definition. Does not know: how answers are made. Place in a training run: under ``judge``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from base.processor import ImagePart
from training.data.formats import PictureRef
from training.evaluation.answers import Respondent
from training.evaluation.catalogue import VISION_METRICS
from training.evaluation.metrics import exact_match, token_f1
from training.evaluation.questions import Question, Show, blank

View = str
"""``true``, ``blank`` or ``swapped``."""
_SCORES: Final = dict(zip(VISION_METRICS, (token_f1, exact_match), strict=True))


@dataclass(frozen=True, slots=True)
class VisionDependence:
    """Of one model (the adapter or the base), with what it is made of."""

    num_rows: int
    views: Mapping[str, Mapping[View, float]]
    """Name of the number -> view -> mean score; ``swapped`` is absent where there was nothing to swap with."""

    def scores(self) -> dict[str, float]:
        """``vision_dependence`` and ``vision_dependence_exact``."""
        return {
            name: views["true"] - max(score for view, score in views.items() if view != "true")
            for name, views in self.views.items()
        }

    def as_json(self) -> dict[str, object]:
        return {"rows": self.num_rows, "views": {name: dict(views) for name, views in self.views.items()}}


def vision_dependence(
    questions: Sequence[Question], respondent: Respondent, *, with_adapter: bool, most: int
) -> VisionDependence | None:
    """Over at most so many of the questions with pictures; None where there are none."""
    pictured = pictured_of(questions, most)
    if not pictured:
        return None
    golds = [question.gold for question in pictured]
    said = {
        view: _answers(view, pictured, shows, respondent, with_adapter)
        for view, shows in _views(pictured, questions).items()
    }
    views = {
        name: {view: fmean(map(score, answers, golds)) for view, answers in said.items()}
        for name, score in _SCORES.items()
    }
    return VisionDependence(len(pictured), views)


def pictured_of(questions: Sequence[Question], most: int) -> list[Question]:
    """Those with pictures; where there are more than ``most``, the least digests."""
    found = [question for question in questions if question.pictures]
    return sorted(found, key=lambda question: question.digest)[:most]


def _views(pictured: Sequence[Question], questions: Sequence[Question]) -> dict[View, list[Show]]:
    shows: dict[View, list[Show]] = {
        "true": [PictureRef.open for _ in pictured],
        "blank": [blank for _ in pictured],
    }
    gallery = _Gallery(questions)
    swaps = [gallery.swapped(question) for question in pictured]
    if any(swap is not None for swap in swaps):
        shows["swapped"] = [blank if swap is None else swap for swap in swaps]
    return shows


def _answers(
    view: View,
    pictured: Sequence[Question],
    shows: Sequence[Show],
    respondent: Respondent,
    with_adapter: bool,
) -> list[str]:
    who = "adapter" if with_adapter else "base"
    prompts = (
        question.prompt(respondent.processor, show) for question, show in zip(pictured, shows, strict=True)
    )
    return respondent.answers(f"{who}, {view} pictures", prompts, len(pictured), with_adapter=with_adapter)


@dataclass(frozen=True, slots=True)
class _Hung:
    """One picture of the held-out rows."""

    picture: PictureRef
    digest: str
    size: tuple[int, int]
    gold: str


class _Gallery:
    """All pictures of the questions, to be swapped among them."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._hung = [
            _Hung(picture, picture.digest(), picture.size(), question.gold)
            for question in questions
            for picture in question.pictures
        ]

    def swapped(self, question: Question) -> Show | None:
        """Another picture for each of the question's; None if there is no other."""
        own = {picture.digest() for picture in question.pictures}
        others = [hung for hung in self._hung if hung.digest not in own]
        others = [hung for hung in others if hung.gold != question.gold] or others
        if not others:
            return None

        def show(picture: PictureRef) -> ImagePart:
            chosen = min(others, key=lambda hung: _distance(picture, hung, question.digest))
            return ImagePart(chosen.picture.open().image, *picture.limits)

        return show


def _distance(picture: PictureRef, hung: _Hung, row_digest: str) -> tuple[float, str]:
    """Of sizes, in octaves of both sides; ties by a hash."""
    width, height = picture.size()
    octaves = abs(math.log2(width / hung.size[0])) + abs(math.log2(height / hung.size[1]))
    return round(octaves, 3), hashlib.sha256(
        f"{row_digest}{picture.digest()}{hung.digest}".encode()
    ).hexdigest()
