"""response_format and tools, from the request to the answer's objects."""

from __future__ import annotations

import json

import pytest

from engine.sampling import GrammarSpec
from tests.fakes import say
from tests.support.wire import CHAT as PATH
from tests.support.wire import Wire, ask, chat, error_of, stream

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, GrammarSpec("json_object")),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": {"type": "array"}},
            },
            GrammarSpec("json_schema", '{"type": "array"}'),
        ),
    ],
)
def test_response_format_becomes_a_compiled_grammar(
    wire: Wire, form: dict[str, object], grammar: GrammarSpec | None
) -> None:
    chat(wire, ask(response_format=form))
    assert wire.engine.requests[0].sampling.grammar == grammar
    assert wire.engine.grammars == ([] if grammar is None else [grammar])


def test_a_schema_that_cannot_be_enforced_is_a_400(wire: Wire) -> None:
    from engine.errors import GrammarError

    wire.engine.grammar_failure = GrammarError("no such keyword")
    error = error_of(wire.post(PATH, ask(response_format={"type": "json_object"})))
    assert (error["code"], error["param"]) == ("invalid_request", "response_format")


def test_a_tool_call_becomes_an_object(wire: Wire) -> None:
    wire.engine.script = say("Let me see.", CALL[:20], CALL[20:])
    (choice,) = chat(wire, ask(tools=[TOOL]))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_a_tool_call_streams_without_its_marks(wire: Wire) -> None:
    wire.engine.script = say("Wait. ", CALL[:5], CALL[5:30], CALL[30:] + "\n" + CALL)
    frames = stream(wire, tools=[TOOL])
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    text = "".join(each.get("content") or "" for each in deltas)
    calls = [call for each in deltas for call in each.get("tool_calls", [])]
    assert text.strip() == "Wait."
    assert [call["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_parallel_tool_calls_false_lets_one_call_through(wire: Wire) -> None:
    wire.engine.script = say(CALL, "\n", CALL)
    (choice,) = chat(wire, ask(tools=[TOOL], parallel_tool_calls=False))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


def test_an_answer_cut_by_its_limit_is_length_even_with_calls(wire: Wire) -> None:
    wire.engine.script = say(CALL, reason="length")
    (choice,) = chat(wire, ask(tools=[TOOL]))["choices"]
    assert choice["finish_reason"] == "length"


def test_without_tools_marks_stay_text(wire: Wire) -> None:
    wire.engine.script = say(CALL)
    (choice,) = chat(wire)["choices"]
    assert choice["message"]["content"] == CALL
    (choice,) = chat(wire, ask(tools=[TOOL], tool_choice="none"))["choices"]
    assert choice["message"]["content"] == CALL
    assert wire.processor.options[-1]["tools"] == []


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["required", "named"]
)
def test_a_forced_call_is_held_to_its_grammar(wire: Wire, choice: object) -> None:
    wire.engine.script = say(CALL)
    chat(wire, ask(tools=[TOOL], tool_choice=choice))
    grammar = wire.engine.requests[0].sampling.grammar
    assert grammar is not None
    assert "weather" in grammar.source
    assert wire.processor.options[0]["tools"] == [TOOL]


def test_tools_and_response_format_together_are_refused(wire: Wire) -> None:
    error = error_of(wire.post(PATH, ask(tools=[TOOL], response_format={"type": "json_object"})))
    assert error["code"] == "unsupported"
