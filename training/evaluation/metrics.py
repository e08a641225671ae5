"""Metrics: how near an answer is to the one in the data.

``scores(names, answers, golds)`` is over a whole set; ``row_scores`` of one answer, for the files that people read.

exact_match  share of answers equal to gold, outer blanks off, composed Unicode; case and punctuation count. 0..1
token_f1     mean over rows of the F1 of the bags of words by SQuAD's normalisation (``text.squad_tokens``). 0..1
bleu         corpus BLEU-4 by sacrebleu: 13a tokens, exponential smoothing, effective order (only orders up to the
             longest that occurs count, so a perfect set of one-word answers has 100; elsewhere nothing changes). 0..100
rouge_l      mean over rows of ROUGE-L's F1 by rouge_score, words of any script, no stemmer. 0..1
chrf         corpus chrF (character 6-grams, beta 2) by sacrebleu. 0..100
json_valid   share of answers that are one JSON value and nothing else (no code fence, no NaN). 0..1

Nothing here uses the network. Does not know: where answers come from. Place in a training run: under ``judge``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Final, Protocol

from training.evaluation.catalogue import ANSWER_METRICS
from training.evaluation.errors import MetricError
from training.evaluation.text import plain, rouge_tokens, squad_tokens


def exact_match(answer: str, gold: str) -> float:
    return float(plain(answer) == plain(gold))


def token_f1(answer: str, gold: str) -> float:
    """Two answers without any word are equal: 1."""
    said, wanted = Counter(squad_tokens(answer)), Counter(squad_tokens(gold))
    if not said or not wanted:
        return float(said == wanted)
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total())


def rouge_l(answer: str, gold: str) -> float:
    """Two answers without any word are equal: 1."""
    if not rouge_tokens(answer) and not rouge_tokens(gold):
        return 1.0
    return float(_rouge().score(gold, answer)["rougeL"].fmeasure)


def json_valid(answer: str, gold: str = "") -> float:
    """1 or 0; ``gold`` plays no part."""
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def bleu(answers: Sequence[str], golds: Sequence[str]) -> float:
    return min(100.0, float(_bleu().corpus_score(list(answers), [list(golds)]).score))


def chrf(answers: Sequence[str], golds: Sequence[str]) -> float:
    return min(100.0, float(_chrf().corpus_score(list(answers), [list(golds)]).score))


def scores(names: Sequence[str], answers: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Of a whole set; ``answers[i]`` belongs to ``golds[i]``. Raises MetricError: none, unequal many, no metric."""
    if len(answers) != len(golds) or not golds:
        raise MetricError(
            f"{len(answers)} answers for {len(golds)} held-out rows: one for each, and at least one"
        )
    return {name: _of_set(name, answers, golds) for name in names}


def row_scores(names: Sequence[str], answer: str, gold: str) -> dict[str, float]:
    """Of one answer. BLEU is left out: of one short sentence it says nothing."""
    return {name: _of_set(name, [answer], [gold]) for name in names if name != "bleu"}


_BY_ROW: Final[Mapping[str, Callable[[str, str], float]]] = {
    "exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l, "json_valid": json_valid,
}  # fmt: skip
_BY_SET: Final[Mapping[str, Callable[[Sequence[str], Sequence[str]], float]]] = {"bleu": bleu, "chrf": chrf}


def _of_set(name: str, answers: Sequence[str], golds: Sequence[str]) -> float:
    if name in _BY_ROW:
        return fmean(map(_BY_ROW[name], answers, golds))
    if name in _BY_SET:
        return _BY_SET[name](answers, golds)
    raise MetricError(f"{name!r} is not computed from answers; these are: {', '.join(ANSWER_METRICS)}")


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


class _CorpusMetric(Protocol):
    def corpus_score(self, hypotheses: list[str], references: list[list[str]]) -> _CorpusScore: ...


class _CorpusScore(Protocol):
    score: float


class _RougeScore(Protocol):
    fmeasure: float


class _Rouge(Protocol):
    def score(self, target: str, prediction: str) -> Mapping[str, _RougeScore]: ...


# Made once, and imported when first needed: the three libraries together take a second to import.


@cache
def _bleu() -> _CorpusMetric:
    from sacrebleu.metrics.bleu import BLEU

    metric: _CorpusMetric = BLEU(effective_order=True)
    return metric


@cache
def _chrf() -> _CorpusMetric:
    from sacrebleu.metrics.chrf import CHRF

    metric: _CorpusMetric = CHRF()
    return metric


@cache
def _rouge() -> _Rouge:
    from rouge_score.rouge_scorer import RougeScorer

    scorer: _Rouge = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_RougeWords())
    return scorer


class _RougeWords:
    """What rouge_score calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_tokens(text)
