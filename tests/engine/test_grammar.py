"""Grammars on the pocket tokenizer: what they let through, what they refuse, and that a bad one fails alone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import base.pocket
from engine import grammar_trial
from engine.errors import GrammarError
from engine.grammar import MAX_CACHED, MAX_SOURCE_BYTES, Grammar, GrammarCompiler, GrammarState
from engine.sampler import NumericalFailure, SampledToken, Sampler, SamplerState
from engine.sampling import GrammarSpec, SamplingParams
from engine.tool_grammar import AnyTool, FreeChoice, OneTool, ToolChoice, tool_grammar

TOKENIZER_FILE = Path(base.pocket.__file__).parent / "checkpoint" / "tokenizer.json"
TOKENIZER = Tokenizer.from_file(str(TOKENIZER_FILE))
PADDED_VOCAB_SIZE = TOKENIZER.get_vocab_size() + 77


def id_of(token: str) -> int:
    token_id = TOKENIZER.token_to_id(token)
    assert token_id is not None
    return token_id


EOS = (id_of("<|im_end|>"), id_of("<|endoftext|>"))
JSON_OBJECT = GrammarSpec("json_object")
CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "required": ["city"]}
CITY_SCHEMA = {**CITY, "$defs": {"c": {"enum": ["Paris", "Rome"]}}, "additionalProperties": False}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, EOS, PADDED_VOCAB_SIZE)


def schema(value: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value, separators=(",", ":")))


def accepts(grammar: Grammar, text: str) -> bool:
    """May this text be generated, token by token, and then end?"""
    state = grammar.start()
    for token_id in TOKENIZER.encode(text).ids:
        if not state.mask()[token_id]:
            return False
        state.advance(token_id)
    return bool(state.mask()[list(EOS)].all())


# ---- schemas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["{}", '{"a": 1}', '{"a":[1,{"b":null}]}', '{\n  "a": {\n    "b": "c"\n  }\n}']
)
def test_json_object_lets_objects_through(compiler: GrammarCompiler, text: str) -> None:
    assert accepts(compiler.compile(JSON_OBJECT), text)


@pytest.mark.parametrize("text", ["[1]", "hello", '{"a"', '{"a": 1} and', "", '{"a":' + " " * 30 + "1}"])
def test_json_object_lets_nothing_else_through(compiler: GrammarCompiler, text: str) -> None:
    assert not accepts(compiler.compile(JSON_OBJECT), text)


def test_a_schema_is_enforced_with_its_references(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(schema(CITY_SCHEMA))
    assert accepts(grammar, '{"city": "Paris"}')
    assert not accepts(grammar, '{"city": "Berlin"}')
    assert not accepts(grammar, '{"city": "Paris", "x": 1}')


def test_a_regular_expression_is_enforced(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(GrammarSpec("regex", "(red|blue) circle"))
    assert accepts(grammar, "blue circle")
    assert not accepts(grammar, "blue square")


def test_ids_beyond_the_tokenizer_are_never_allowed(compiler: GrammarCompiler) -> None:
    mask = compiler.compile(GrammarSpec("regex", "(?s:.*)")).start().mask()
    assert mask.shape == (PADDED_VOCAB_SIZE,)
    assert mask.dtype == torch.bool
    assert not mask[TOKENIZER.get_vocab_size() :].any()
    assert mask[: TOKENIZER.get_vocab_size()].sum() > 900


def test_special_tokens_cannot_stand_inside_a_string(compiler: GrammarCompiler) -> None:
    state = compiler.compile(JSON_OBJECT).start()
    for token_id in TOKENIZER.encode('{"a": "').ids:
        state.advance(token_id)
    mask = state.mask()
    assert not mask[[id_of("<tool_call>"), id_of("<|image_pad|>"), *EOS]].any()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"type": "string", "not": {"const": "x"}}, 'Unimplemented keys: \\["not"\\]'),
        ({"properties": {"a": {"uniqueItems": True, "items": {}}}}, "uniqueItems"),
        ({"type": "objekt"}, "Invalid type"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#"}, "no text can satisfy it"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "http://example.com/schema"}, "http://example.com/schema"),
        ([1], "must be a JSON object"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    compiler: GrammarCompiler, value: object, reason: str
) -> None:
    with pytest.raises(GrammarError, match=reason):
        compiler.compile(schema(value))


@pytest.mark.parametrize("text", ["", "{", '{"items":' * 3000, '{"a": NaN', "\ud800"])
def test_what_is_no_json_is_refused(compiler: GrammarCompiler, text: str) -> None:
    with pytest.raises(GrammarError):
        compiler.compile(GrammarSpec("json_schema", text))


def test_a_large_schema_is_refused_with_the_limit(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match=str(MAX_SOURCE_BYTES)):
        compiler.compile(schema({"description": "x" * MAX_SOURCE_BYTES}))


def test_a_schema_cannot_loosen_its_own_limits(compiler: GrammarCompiler) -> None:
    options = {"lenient": True, "whitespace_pattern": "[ ]*"}
    with pytest.raises(GrammarError, match="not"):
        compiler.compile(schema({"type": "object", "x-guidance": options, "not": {}}))


def test_an_error_quotes_no_schema_at_length(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(schema({"properties": {"secret" * 500: {"type": "objekt" * 500}}}))
    assert len(str(caught.value)) < 500


def test_a_long_chain_of_references_does_not_overflow_the_stack(compiler: GrammarCompiler) -> None:
    """It ended the process when it was compiled on an ordinary thread."""
    num_links = 1500
    links = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(num_links)}
    chain = {"$ref": "#/$defs/0", "$defs": {**links, str(num_links): {}}}
    outcome: list[bool] = []

    def follow() -> None:
        grammar = compiler.compile(schema(chain))
        state = grammar.start()
        for token_id in TOKENIZER.encode("[" * 400).ids:
            state.mask()
            state.advance(token_id)
        outcome.append(bool(state.mask().any()))

    thread = threading.Thread(target=follow)
    thread.start()
    thread.join()
    assert outcome == [True]


def letters(count: int) -> list[dict[str, str]]:
    return [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(count)]


@pytest.mark.parametrize(
    ("value", "cpu_s"),
    [({"allOf": letters(24)}, 3), ({"type": "integer", "multipleOf": 99_999_989}, 1)],
    ids=["patterns", "multiple"],
)
def test_a_schema_that_would_take_minutes_and_gigabytes_holds_nobody_up(
    compiler: GrammarCompiler, value: object, cpu_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grammar_trial.MAX_CPU_S == 3
    monkeypatch.setattr(grammar_trial, "MAX_CPU_S", cpu_s)
    with pytest.raises(GrammarError, match=f"{cpu_s} s or 1024 MiB"):
        compiler.compile(schema(value))
    begin_s = time.monotonic()
    assert accepts(compiler.compile(schema({"const": str(value)[:9]})), json.dumps(str(value)[:9]))
    assert time.monotonic() - begin_s < 2


def test_a_tool_whose_arguments_take_minutes_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "MAX_CPU_S", 1)
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 99_999_989}}}
    spec = tool_grammar(
        [{"type": "function", "function": {"name": "f", "parameters": parameters}}], AnyTool()
    )
    assert spec is not None
    with pytest.raises(GrammarError, match="simplify it"):
        compiler.compile(spec)


# ---- the compiler ------------------------------------------------------------------------------------------------


def test_equal_specs_are_compiled_once(compiler: GrammarCompiler) -> None:
    assert compiler.compile(schema(CITY_SCHEMA)) is compiler.compile(schema(CITY_SCHEMA))


def test_the_cache_forgets_the_oldest(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_CACHED >= 64
    monkeypatch.setattr("engine.grammar.MAX_CACHED", 8)
    first = compiler.compile(GrammarSpec("regex", "first"))
    for i in range(7):
        compiler.compile(GrammarSpec("regex", f"other{i}"))
    assert compiler.compile(GrammarSpec("regex", "first")) is first
    for i in range(8):
        compiler.compile(GrammarSpec("regex", f"another{i}"))
    assert compiler.compile(GrammarSpec("regex", "first")) is not first


def test_many_threads_may_compile_and_start(compiler: GrammarCompiler) -> None:
    found: list[bool] = []

    def work(i: int) -> None:
        for j in range(5):
            found.append(
                accepts(
                    compiler.compile(GrammarSpec("regex", f"red circle {(i + j) % 3}")),
                    f"red circle {(i + j) % 3}",
                )
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


def test_a_tokenizer_without_the_mark_refuses_tool_calls() -> None:
    description = json.loads(TOKENIZER.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if "tool_call" not in t["content"]]
    bare = GrammarCompiler(Tokenizer.from_str(json.dumps(description)), EOS, PADDED_VOCAB_SIZE)
    spec = tool_grammar(TOOLS, AnyTool())
    assert spec is not None
    with pytest.raises(GrammarError, match="no <tool_call> token"):
        bare.compile(spec)


# ---- in the sampler ----------------------------------------------------------------------------------------------


def generate(state: GrammarState, params: SamplingParams, num_tokens: int) -> tuple[list[int], bool]:
    """Tokens from noise under the grammar, until an end token."""
    noise = torch.randn(
        num_tokens, PADDED_VOCAB_SIZE, generator=torch.Generator().manual_seed(params.seed or 0)
    )
    sampler = SamplerState(params, (1,), EOS, PADDED_VOCAB_SIZE, state)
    chosen: list[int] = []
    for row in noise:
        token_id = only_token(row, sampler)
        if token_id in EOS:
            return chosen, True
        chosen.append(token_id)
        sampler.accept(token_id)
    return chosen, False


def only_token(row: Tensor, state: SamplerState) -> int:
    [sampled] = Sampler(PADDED_VOCAB_SIZE).sample([row], [state])
    assert isinstance(sampled, SampledToken)
    return sampled.token_id


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_noise_under_a_schema_is_valid(compiler: GrammarCompiler, temperature: float) -> None:
    fields = {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "c": {"enum": ["red", "blue"]},
        "b": {"type": "boolean"},
    }
    spec = schema(
        {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    )
    for seed in range(8):
        params = SamplingParams(400, temperature=temperature, seed=seed)
        token_ids, has_ended = generate(compiler.compile(spec).start(), params, 400)
        assert has_ended
        value = json.loads(TOKENIZER.decode(token_ids))
        assert set(value) == {"n", "c", "b"}
        assert 0 <= value["n"] <= 99


def test_a_complete_grammar_ends_in_spite_of_min_tokens(compiler: GrammarCompiler) -> None:
    params = SamplingParams(50, temperature=0.0, min_tokens=50)
    token_ids, has_ended = generate(compiler.compile(GrammarSpec("regex", "red circle")).start(), params, 50)
    assert TOKENIZER.decode(token_ids) == "red circle"
    assert has_ended


def test_a_state_tells_when_only_the_end_may_follow(compiler: GrammarCompiler) -> None:
    params = SamplingParams(50, temperature=0.0)
    state = SamplerState(
        params, (), EOS, PADDED_VOCAB_SIZE, compiler.compile(GrammarSpec("regex", "red")).start()
    )
    told = [state.is_complete]
    for token_id in TOKENIZER.encode("red").ids:
        state.accept(token_id)
        told.append(state.is_complete)
    assert (told[0], told[-1]) == (False, True)
    state.accept(EOS[0])
    state.accept(EOS[0])
    assert only_token(torch.zeros(PADDED_VOCAB_SIZE), state) in EOS
    assert not SamplerState(params, (), EOS, PADDED_VOCAB_SIZE).is_complete


def test_a_grammar_that_broke_raises_at_the_next_step_and_not_before(compiler: GrammarCompiler) -> None:
    state = SamplerState(
        SamplingParams(5, temperature=0.0), (), EOS, PADDED_VOCAB_SIZE, compiler.compile(JSON_OBJECT).start()
    )
    state.accept(id_of("!"))
    with pytest.raises(GrammarError, match="cannot be followed"):
        Sampler(PADDED_VOCAB_SIZE).sample([torch.zeros(PADDED_VOCAB_SIZE)], [state])


def test_nan_where_the_grammar_forbids_is_still_a_failure(compiler: GrammarCompiler) -> None:
    state = SamplerState(
        SamplingParams(5, temperature=0.0), (), EOS, PADDED_VOCAB_SIZE, compiler.compile(JSON_OBJECT).start()
    )
    row = torch.zeros(PADDED_VOCAB_SIZE)
    row[id_of("!")] = torch.nan
    assert Sampler(PADDED_VOCAB_SIZE).sample([row], [state]) == [NumericalFailure()]


# ---- tool calls --------------------------------------------------------------------------------------------------

WEATHER: dict[str, object] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": CITY_SCHEMA},
}
CLOCK: dict[str, object] = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
WEATHER_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
WRONG_CALL = WEATHER_CALL.replace("Rome", "Oslo")


@pytest.mark.parametrize(
    ("choice", "is_parallel", "good", "bad"),
    [
        (
            AnyTool(),
            True,
            [WEATHER_CALL, CLOCK_CALL, f"{WEATHER_CALL}\n{CLOCK_CALL}"],
            ["hello", WRONG_CALL, ""],
        ),
        (AnyTool(), False, [WEATHER_CALL, CLOCK_CALL], [f"{WEATHER_CALL}\n{CLOCK_CALL}"]),
        (OneTool("clock"), True, [CLOCK_CALL], [WEATHER_CALL, f"{CLOCK_CALL}\n{CLOCK_CALL}"]),
    ],
)
def test_tool_choice_is_enforced(
    compiler: GrammarCompiler, choice: ToolChoice, is_parallel: bool, good: list[str], bad: list[str]
) -> None:
    spec = tool_grammar(TOOLS, choice, is_parallel=is_parallel)
    assert spec is not None
    grammar = compiler.compile(spec)
    assert all(accepts(grammar, text) for text in good)
    assert not any(accepts(grammar, text) for text in bad)


def strict(tool: dict[str, object]) -> dict[str, object]:
    function = tool["function"]
    assert isinstance(function, dict)
    return {**tool, "function": {**function, "strict": True}}


@pytest.mark.parametrize("is_parallel", [True, False])
def test_free_choice_binds_only_the_calls_of_strict_tools(
    compiler: GrammarCompiler, is_parallel: bool
) -> None:
    assert tool_grammar(TOOLS, FreeChoice()) is None
    spec = tool_grammar([strict(WEATHER), CLOCK], FreeChoice(), is_parallel=is_parallel)
    assert spec is not None
    grammar = compiler.compile(spec)
    assert accepts(grammar, "It is noon.")
    assert accepts(grammar, f"Let me see. {WEATHER_CALL}")
    assert not accepts(grammar, f"Let me see. {WRONG_CALL}")
    assert accepts(grammar, f"{WEATHER_CALL}\n{CLOCK_CALL}") is is_parallel


def test_only_strict_tools_insist_on_every_keyword(compiler: GrammarCompiler) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}}
    tool: dict[str, object] = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    loose, bound = tool_grammar([tool], AnyTool()), tool_grammar([strict(tool)], AnyTool())
    assert loose is not None
    assert bound is not None
    assert accepts(
        compiler.compile(loose), '<tool_call>\n{"name": "f", "arguments": {"a": "y"}}\n</tool_call>'
    )
    with pytest.raises(GrammarError, match=r'Unimplemented keys: \["not"\]$'):
        compiler.compile(bound)


@pytest.mark.parametrize(
    "tools",
    [[{"type": "function"}], [{"function": {"name": 1}}], [{"function": {"name": "f", "parameters": [1]}}]],
)
def test_what_is_no_tool_is_refused(tools: list[dict[str, object]]) -> None:
    with pytest.raises(GrammarError):
        tool_grammar(tools, AnyTool())


def test_an_unknown_tool_is_refused() -> None:
    with pytest.raises(GrammarError, match="'nope', which is not among the tools"):
        tool_grammar(TOOLS, OneTool("nope"))
