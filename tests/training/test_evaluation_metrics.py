"""Each metric gives what a calculation by hand gives, for any script, without the network."""

from __future__ import annotations

import math
import socket

import pytest
import torch

from training.evaluation import metrics
from training.evaluation.catalogue import ANSWER_METRICS, DEFAULT_METRICS, chosen_metrics, expected_numbers
from training.evaluation.errors import MetricError
from training.evaluation.general import kl_divergence
from training.evaluation.text import rouge_tokens, squad_tokens


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a metric opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("A kite.", "A kite.", 1.0),
        (" A kite.\n", "A kite.", 1.0),
        ("a kite.", "A kite.", 0.0),
        ("A kite", "A kite.", 0.0),
        ("caf\u0065\u0301", "caf\u00e9", 1.0),  # composed and not: the same text
        ("", "", 1.0),
        ("", "x", 0.0),
    ],
)
def test_exact_match(answer: str, gold: str, expected: float) -> None:
    assert metrics.exact_match(answer, gold) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("The red kite!", "a Red, kite", 1.0),  # case, punctuation and articles do not count
        ("red kite", "red boat", 0.5),  # 1 of 2 and 1 of 2
        ("red", "a big red kite", 0.5),  # precision 1, recall 1/3
        ("red red red", "red", 0.5),  # a word counts as often as it is there: precision 1/3
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("the", "a", 1.0),  # no words at all, both
        ("", "", 1.0),
        ("红色风筝", "红色的船", 0.5),  # 2 of 4 characters, both ways
        ("«Été»", "été", 1.0),
    ],
)
def test_token_f1(answer: str, gold: str, expected: float) -> None:
    assert metrics.token_f1(answer, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat", "the cat sat down", 2 * 1.0 * 0.5 / 1.5),  # precision 1, recall 1/2
        ("sat cat the", "the cat sat", 1 / 3),  # the longest common subsequence is one word
        ("été chaud", "été froid", 0.5),
        ("红船", "红船", 1.0),
        ("", "x", 0.0),
        ("...", "", 1.0),
    ],
)
def test_rouge_l(answer: str, gold: str, expected: float) -> None:
    assert metrics.rouge_l(answer, gold) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["The cat's on 2 mats, isn't it?", "under_score A-b c3"])
def test_rouge_s_words_are_rouge_score_s_for_english(text: str) -> None:
    from rouge_score.tokenize import tokenize

    assert rouge_tokens(text) == tokenize(text, None)


def test_words_of_scripts_with_combining_marks_stay_whole() -> None:
    assert len(rouge_tokens("हिन्दी भाषा")) == len(squad_tokens("हिन्दी भाषा")) == 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"a": [1, null]}', 1.0), (" 3 ", 1.0), ('"x"', 1.0), ("", 0.0), ("NaN", 0.0), ('{"a": 1} so', 0.0),
        ('```json\n{"a": 1}\n```', 0.0), ("{'a': 1}", 0.0), ("[" * 100_000, 0.0), ("9" * 10_000, 0.0),
    ],
)  # fmt: skip
def test_json_validity(answer: str, expected: float) -> None:
    assert metrics.json_valid(answer) == expected


def test_bleu_by_hand() -> None:
    """5 of 6 words, 4 of 5 pairs, 3 of 4 triples, 2 of 3 runs of four; as long as gold, so no penalty."""
    answer, gold = "the cat sat on the mat", "the cat sat on the rug"
    expected = 100 * math.exp(sum(math.log(p) for p in (5 / 6, 4 / 5, 3 / 4, 2 / 3)) / 4)
    assert metrics.bleu([answer], [gold]) == pytest.approx(expected)


def test_bleu_is_of_the_whole_set_and_punishes_brevity() -> None:
    answers, golds = ["a b c d", "e f g h"], ["a b c d e f", "e f g h i j"]  # all right, but 8 words for 12
    assert metrics.bleu(answers, golds) == pytest.approx(100 * math.exp(1 - 12 / 8))


def test_a_perfect_set_of_short_answers_has_all_of_bleu() -> None:
    assert metrics.bleu(["yes", "no"], ["yes", "no"]) == pytest.approx(100)


def test_bleu_of_nothing_said_is_zero() -> None:
    assert metrics.bleu(["", ""], ["a b c d", "e"]) == 0.0


def test_chrf_by_hand() -> None:
    """ "ab" for "abc": letters 2/2 and 2/3, pairs 1/1 and 1/2, no longer runs in both; F2 of the mean of each order."""
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert metrics.chrf(["ab"], ["abc"]) == pytest.approx(expected)
    assert metrics.chrf([""], ["abc"]) == 0.0
    assert metrics.chrf(["红船"], ["红船"]) == pytest.approx(100)


def test_all_metrics_of_a_set_and_of_a_row() -> None:
    found = metrics.scores(ANSWER_METRICS, ["a kite", "1"], ["a kite", "2"])
    assert list(found) == list(ANSWER_METRICS)
    assert (found["exact_match"], found["token_f1"], found["json_valid"]) == (0.5, 0.5, 0.5)
    row = metrics.row_scores(ANSWER_METRICS, "a kite", "a kite")
    assert "bleu" not in row and row["exact_match"] == 1.0 and row["chrf"] == pytest.approx(100)


@pytest.mark.parametrize(("answers", "golds"), [([], []), (["a"], ["a", "b"])])
def test_answers_and_gold_must_be_as_many(answers: list[str], golds: list[str]) -> None:
    with pytest.raises(MetricError, match="answers for"):
        metrics.scores(["exact_match"], answers, golds)


def test_a_number_that_is_not_of_answers_cannot_be_computed_from_them() -> None:
    with pytest.raises(MetricError, match="not computed from answers"):
        metrics.scores(["loss"], ["a"], ["a"])


def test_metrics_that_are_asked_for() -> None:
    assert chosen_metrics(()) == DEFAULT_METRICS
    assert chosen_metrics(("json_valid", "exact_match", "loss")) == ("exact_match", "json_valid")
    assert chosen_metrics(("loss",)) == DEFAULT_METRICS
    with pytest.raises(MetricError, match=r"'blue'; known are loss, exact_match, .*bleu"):
        chosen_metrics(("blue",))


def test_numbers_that_there_will_be() -> None:
    text = expected_numbers((), has_rows=True, has_pictures=False, has_loss=False, has_general=False)
    assert text == DEFAULT_METRICS
    all_of_them = expected_numbers((), has_rows=True, has_pictures=True, has_loss=True)
    assert {"loss", "vision_dependence", "general_kl"} <= set(all_of_them)
    assert expected_numbers((), has_rows=False, has_pictures=True, has_loss=True) == ()


def test_divergence_by_hand() -> None:
    base = torch.tensor([0.5, 0.5]).log()
    adapter = torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(base, adapter) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert kl_divergence(base, base) == 0.0
    ruled_out = torch.tensor([0.0, 1.0, -torch.inf])
    assert kl_divergence(ruled_out, ruled_out + 3) == pytest.approx(0.0, abs=1e-12)
