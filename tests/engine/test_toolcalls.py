"""The tool-call parser: whole calls, no leaked marks, malformed ones as the text that they were."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.toolcalls import OPEN, ParsedCall, TextPiece, ToolCallParser, ToolEvent

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g", "arguments": {"x": [1.0, "é"]}}\n</tool_call>'


def parse(*pieces: str) -> list[ToolEvent]:
    """Events with neighbouring texts joined."""
    parser = ToolCallParser()
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    joined: list[ToolEvent] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece):
            joined[-1] = TextPiece(last.text + event.text)
        else:
            joined.append(event)
    return joined


F = ParsedCall(0, "f", '{"a": 1}')


def test_one_call() -> None:
    assert parse(CALL) == [F]


def test_several_calls_with_text_around() -> None:
    text = f"Let me see.\n{CALL}\n{OTHER}\nDone"
    expected = [TextPiece("Let me see."), F, ParsedCall(1, "g", '{"x": [1.0, "é"]}'), TextPiece("Done")]
    assert parse(text) == expected


def test_text_is_given_out_at_once_and_a_possible_mark_is_not() -> None:
    parser = ToolCallParser()
    assert parser.feed("Hello ") == [TextPiece("Hello")]
    assert parser.feed("<too") == []
    assert parser.feed("lbox> ") == [TextPiece(" <toolbox>")]
    assert parser.feed("<tool_call") == []
    assert parser.feed(">") == []
    assert parser.finish() == [TextPiece(" <tool_call>")]


@pytest.mark.parametrize(
    "arguments",
    [
        "{}",
        '{"a": "</tool_call>"}',
        '{"a": "\\"</tool_call>\\""}',
        '{"a": "<tool_call>"}',
        '{"a":{"b":[{}]}}',
        '{"n": 1e400}',
    ],
)
def test_arguments_are_the_models_own_text(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert parse(text) == [ParsedCall(0, "f", arguments)]


def test_arguments_may_come_first_be_missing_or_be_quoted_once_more() -> None:
    assert parse('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>') == [F]
    assert parse('<tool_call>{"name": "f"}</tool_call>') == [ParsedCall(0, "f", "{}")]
    assert parse('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>') == [F]


def test_a_complete_call_without_its_closing_mark_counts() -> None:
    assert parse(CALL.removesuffix("</tool_call>")) == [F]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "hello",
        "{}",
        "[1]",
        '{"name": "f", "arguments": {"a": }}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "x"}',
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {}} and more',
        '{"name": "f", "arguments": {}},',
        '{name: "f"}',
        "{{}}",
        '{"name": "f" "arguments": {}}',
        '{"name": "f", "arguments": ' + "[" * 100_000,
        '{"name": "f", "arguments": {"n": ' + "1" * 5000 + "}}",
    ],
    ids=lambda body: body[:24],
)
def test_what_is_malformed_is_the_text_that_it_was(body: str) -> None:
    text = f"so: <tool_call>{body}</tool_call> ok"
    assert parse(text) == [TextPiece(text)]


def test_a_sound_call_behind_a_malformed_one_is_found() -> None:
    wrong = '<tool_call>\n{"name": "f, "arguments": {}}\n</tool_call>'
    assert parse(f"{wrong}\n{CALL}") == [TextPiece(wrong), F]
    assert parse(f'<tool_call>{{"name": "f}}</tool_call>\n{CALL}') == [
        TextPiece('<tool_call>{"name": "f}</tool_call>'),
        F,
    ]
    assert parse(f"I call it <tool_call>, so: {CALL}") == [TextPiece("I call it <tool_call>, so:"), F]


def test_an_unclosed_mark_keeps_the_text_behind_it() -> None:
    text = f'{OPEN} is a mark.\n{OPEN}\n{{"name": "f", '
    assert parse(text) == [TextPiece(text)]


def test_many_marks_are_parsed_in_linear_time() -> None:
    text = OPEN * 20_000
    assert parse(text, "</tool_call>") == [TextPiece(text + "</tool_call>")]
    assert parse(text) == [TextPiece(text)]
    assert parse(OPEN + '"' + "</tool_call>" * 20_000)[0] == TextPiece(OPEN + '"' + "</tool_call>" * 20_000)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('<tol_ca>/ \n{"x'), max_size=60))
def test_text_without_a_call_is_unchanged(text: str) -> None:
    assert parse(text) == ([TextPiece(text)] if text else [])


PARTS = [
    CALL,
    OTHER,
    "text",
    " ",
    "\n",
    "<tool_",
    "call>",
    "</tool_call>",
    "<tool_call>",
    '{"name": "',
    '"}',
    "<",
]


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=8), cuts=st.lists(st.integers(0, 300), max_size=10))
def test_events_do_not_depend_on_the_cuts(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    events = parse(text)
    assert parse(*pieces) == events
    calls = [event for event in events if isinstance(event, ParsedCall)]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
