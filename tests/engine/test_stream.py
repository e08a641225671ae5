"""Text assembly: stop strings never leak, tokens stay with their text, usage counts what was generated."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import Finished, FinishReason, Started, Timings, TokenLogprob, Tokens, Usage
from engine.stopping import StopMatcher
from engine.stream import Delta, Finish, TextAssembler
from tests.support.requests import make_image, make_request

END = 1000
TIMINGS = Timings(1.0, 2.0, 3.0, 4.0)
EMOJI = "🦜".encode()


class Words:
    """A token table of a test's own: id i is the i-th entry; END is special."""

    def __init__(self, *entries: str | bytes) -> None:
        self._entries = [entry.encode() if isinstance(entry, str) else entry for entry in entries]

    def token_bytes(self, token_id: int) -> bytes:
        return b"<|im_end|>" if token_id == END else self._entries[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id == END


def assembler(*entries: str | bytes, **params: object) -> TextAssembler:
    return TextAssembler(make_request(**params), Words(*entries), clock=lambda: 7.0)  # type: ignore[arg-type]


def finished(num_tokens: int, reason: FinishReason = "length", stop_token_id: int | None = None) -> Finished:
    return Finished("r", reason, stop_token_id, Usage(5, num_tokens), TIMINGS)


def scored(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -float(token_id))


def run(made: TextAssembler, token_ids: list[int], end: Finished) -> list[Delta | Finish]:
    items: list[Delta | Finish] = []
    for token_id in token_ids:
        items += made.push(Tokens("r", (token_id,), (scored(token_id),)))
    return items + made.push(end)


def text_of(items: list[Delta | Finish]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


def ids_of(items: list[Delta | Finish]) -> list[int]:
    return [i for item in items if isinstance(item, Delta) for i in item.token_ids]


def finish_of(items: list[Delta | Finish]) -> Finish:
    assert isinstance(items[-1], Finish)
    assert not any(isinstance(item, Finish) for item in items[:-1])
    return items[-1]


# ---- StopMatcher -------------------------------------------------------------------------------------------------


def plain_cut(text: str, stops: list[str], is_included: bool) -> tuple[str, str | None]:
    """The loop that defines truth: a character at a time, the longest stop that ends here."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if is_included else text[: end - len(stop)]), stop
    return text, None


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=25),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    is_included=st.booleans(),
)
def test_stops_cut_where_the_plain_loop_cuts(
    text: str, stops: list[str], cuts: list[int], is_included: bool
) -> None:
    matcher, shown, stop = StopMatcher(stops, is_included), "", None
    expected, expected_stop = plain_cut(text, stops, is_included)
    for piece in split(text, cuts):
        part, match = matcher.feed(piece)
        shown += part
        assert expected.startswith(shown), "text was shown that had to be held back"
        if match is not None:
            stop = match.stop
            break
    else:
        shown += matcher.flush()
    assert (shown, stop) == (expected, expected_stop)


def test_no_more_is_held_back_than_may_become_a_stop() -> None:
    matcher = StopMatcher(["\n\nHuman:", "END"])
    assert matcher.feed("hello\n") == ("hello", None)
    assert matcher.feed("\nHu") == ("", None)
    assert matcher.feed("mid E") == ("\n\nHumid ", None)
    assert matcher.feed("N") == ("", None)
    assert matcher.flush() == "EN"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


# ---- TextAssembler -----------------------------------------------------------------------------------------------


def test_text_and_tokens_come_as_they_are_generated() -> None:
    made = assembler("Hel", "lo", " you")
    items = run(made, [0, 1, 2], finished(3))
    deltas = [item for item in items if isinstance(item, Delta)]
    assert [(d.text, d.token_ids, d.logprobs) for d in deltas] == [
        ("Hel", (0,), (scored(0),)),
        ("lo", (1,), (scored(1),)),
        (" you", (2,), (scored(2),)),
    ]
    assert finish_of(items) == Finish("length", None, Usage(5, 3), TIMINGS)


def test_a_split_character_comes_with_all_its_tokens() -> None:
    made = assembler("a", b"\xf0\x9f", b"\x98", b"\x80", "b")
    items = run(made, [0, 1, 2, 3, 4], finished(5))
    deltas = [(item.text, item.token_ids) for item in items if isinstance(item, Delta)]
    assert deltas == [("a", (0,)), ("😀", (1, 2, 3)), ("b", (4,))]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    items = run(assembler("a", b"\xf0\x9f"), [0, 1], finished(2))
    assert text_of(items) == "a\ufffd"
    assert ids_of(items) == [0, 1]


def test_the_end_token_shows_nothing_and_is_named() -> None:
    items = run(assembler("a", "b"), [0, 1, END], finished(3, "stop", END))
    assert text_of(items) == "ab"
    assert ids_of(items) == [0, 1]
    assert finish_of(items) == Finish("stop", END, Usage(5, 3), TIMINGS)


def test_the_end_token_shows_nothing_even_behind_text_that_was_held_back() -> None:
    items = run(assembler("a", "E", stop=("END",)), [0, 1, END], finished(3, "stop", END))
    assert text_of(items) == "aE"
    assert ids_of(items) == [0, 1]
    assert finish_of(items).stop == END


def test_special_tokens_in_the_middle_come_with_the_text_behind_them() -> None:
    items = run(assembler("a", "b", ignore_eos=True), [0, END, 1, END], finished(4))
    assert [(item.text, item.token_ids) for item in items if isinstance(item, Delta)] == [
        ("a", (0,)),
        ("b", (END, 1)),
        ("", (END,)),
    ], "at a limit every token was part of the answer"


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    made = assembler("one", " ST", "O", "P two", "three", stop=("STOP",))
    items = [item for i in range(4) for item in made.push(Tokens("r", (i,), (scored(i),)))]
    assert made.is_finished
    assert text_of(items) == "one "
    assert ids_of(items) == [0, 1], "the tokens that show any of the text, and no others"
    finish = finish_of(items)
    assert (finish.reason, finish.stop, finish.usage.completion_tokens) == ("stop", "STOP", 4)
    assert made.push(Tokens("r", (4,), ())) == [], (
        "what the engine did before it heard of the stop is dropped"
    )
    assert made.push(finished(6, "stop")) == []


def test_a_stop_string_can_be_left_in_the_text() -> None:
    made = assembler("one", " ST", "OP two", stop=("STOP",), include_stop_str_in_output=True)
    items = [item for i in range(3) for item in made.push(Tokens("r", (i,)))]
    assert text_of(items) == "one STOP"
    assert ids_of(items) == [0, 1, 2]


def test_several_tokens_at_once_stop_at_the_one_that_completes_the_match() -> None:
    made = assembler("a", "EN", "D", "b", stop=("END",))
    items = made.push(Tokens("r", (0, 1, 2, 3)))
    assert text_of(items) == "a"
    assert finish_of(items).usage.completion_tokens == 3


def test_held_back_text_is_shown_when_no_stop_came() -> None:
    items = run(assembler("a", "EN", stop=("END",)), [0, 1], finished(2))
    assert text_of(items) == "aEN"
    assert ids_of(items) == [0, 1]
    assert finish_of(items).reason == "length"


def test_stop_strings_count_only_behind_min_tokens() -> None:
    items = run(assembler("END", "x", "END", stop=("END",), min_tokens=2), [0, 1, 2], finished(3))
    assert text_of(items) == "ENDx"
    assert finish_of(items).stop == "END"


def test_a_stop_token_with_text_is_hidden_unless_asked_for() -> None:
    hidden = run(assembler("a", ".", stop_token_ids=(1,)), [0, 1], finished(2, "stop", 1))
    assert (text_of(hidden), ids_of(hidden), finish_of(hidden).stop) == ("a", [0], 1)
    made = assembler("a", ".", stop_token_ids=(1,), include_stop_str_in_output=True)
    assert text_of(run(made, [0, 1], finished(2, "stop", 1))) == "a."


def test_a_stop_token_before_min_tokens_is_text() -> None:
    items = run(assembler("a", ".", stop_token_ids=(1,), min_tokens=3), [1, 0, 0, 1], finished(4, "stop", 1))
    assert text_of(items) == ".aa"


def test_prompt_logprobs_come_once_and_may_come_alone() -> None:
    prompt = (None, TokenLogprob(3, -0.5))
    made = assembler("a")
    assert made.push(Tokens("r", (), prompt_logprobs=prompt)) == [Delta("", (), (), prompt)]
    assert made.push(Tokens("r", (0,))) == [Delta("a", (0,), ())]


def test_an_abort_gives_what_was_held_back() -> None:
    items = run(assembler("E", stop=("END",)), [0], finished(1, "abort"))
    assert text_of(items) == "E"
    assert finish_of(items).reason == "abort"


def test_usage_and_times_at_a_stop_string_are_the_assemblers_own() -> None:
    times = iter([2.0, 3.0, 7.0])
    request = replace(make_request(images=(make_image("i", 0, 4),), stop=("END",)), arrival_s=0.5)
    made = TextAssembler(request, Words("END"), clock=lambda: next(times))
    assert made.push(Started("r", swap_s=0.25, cached_tokens=3)) == []
    finish = finish_of(made.push(Tokens("r", (0,))))
    assert finish.usage == Usage(5, 1, cached_tokens=3, image_tokens=4)
    assert finish.timings == Timings(1.5, 0.25, 1.0, 4.0)


def test_deltas_join() -> None:
    prompt = (None,)
    joined = Delta("a", (1,), (scored(1),), prompt).joined(Delta("b", (2,), (scored(2),)))
    assert joined == Delta("ab", (1, 2), (scored(1), scored(2)), prompt)


WORDS: list[str | bytes] = ["a", "b", "E", "EN", "D", "ND", b"\xe6", b"\x97", b"\xa5", "END", "xE"]


@settings(max_examples=200, deadline=None)
@given(
    token_ids=st.lists(st.one_of(st.integers(0, len(WORDS) - 1), st.just(END)), max_size=20),
    stops=st.lists(st.sampled_from(["END", "ab", "日", "D"]), max_size=2),
)
def test_any_answer_is_its_decoding_cut_at_the_first_stop(token_ids: list[int], stops: list[str]) -> None:
    made = assembler(*WORDS, stop=tuple(stops))
    items: list[Delta | Finish] = []
    for token_id in token_ids:
        items += made.push(Tokens("r", (token_id,), (scored(token_id),)))
    items += made.push(finished(len(token_ids)))
    table = Words(*WORDS)
    whole = b"".join(table.token_bytes(i) for i in token_ids if i != END).decode(errors="replace")
    expected, stop = plain_cut(whole, stops, is_included=False)
    assert text_of(items) == expected
    assert finish_of(items).stop == stop
    ids = ids_of(items)
    assert ids == token_ids[: len(ids)], "tokens come in order, and none is left out"
    for item in items[:-1]:
        assert isinstance(item, Delta)
        assert item.text or item is items[-2], "only the last piece may be tokens without text of their own"
        assert [score.token_id for score in item.logprobs] == list(item.token_ids)


class OnlyWay(TextAssembler):
    """Takes every token the way that works for all."""

    def _take_plain(self, message: Tokens) -> Delta | None:
        return None


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(st.integers(0, 8), st.just(END), st.lists(st.integers(0, 8), max_size=3)), max_size=12
    ),
    stop=st.sampled_from([(), ("ab",)]),
    stop_token_ids=st.sampled_from([(), (1,)]),
    min_tokens=st.integers(0, 3),
    is_scored=st.booleans(),
    scores_prompt=st.booleans(),
    reason=st.sampled_from(["length", "stop", "abort"]),
)
def test_the_usual_token_is_taken_as_any_other_would_be(
    pieces: list[int | list[int]],
    stop: tuple[str, ...],
    stop_token_ids: tuple[int, ...],
    min_tokens: int,
    is_scored: bool,
    scores_prompt: bool,
    reason: FinishReason,
) -> None:
    entries = ("a", "b", "", "\0\u2028é", "漢 🦜", EMOJI[:2], EMOJI[2:], b"\xff", b"c" + EMOJI[:1])
    params = {"stop": stop, "stop_token_ids": stop_token_ids, "min_tokens": min_tokens}
    request, words = make_request(**params), Words(*entries)  # type: ignore[arg-type]
    seen = []
    for kind in (TextAssembler, OnlyWay):
        made = kind(request, words, clock=lambda: 7.0)
        items: list[Delta | Finish] = []
        for i, piece in enumerate(pieces):
            ids = tuple(piece) if isinstance(piece, list) else (piece,)
            logprobs = tuple(scored(token_id) for token_id in ids) if is_scored else ()
            prompt = (None, scored(3)) if scores_prompt and i == 0 else None
            items += made.push(Tokens("r", ids, logprobs, prompt_logprobs=prompt))
        seen.append(items + made.push(finished(len(pieces), reason)))
    assert seen[0] == seen[1]
