"""The grammar of tool calls as Qwen2.5 writes them: ``<tool_call>``, one JSON object with name and arguments, and
``</tool_call>``. From OpenAI's ``tools`` and ``tool_choice`` to a GrammarSpec.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from engine.errors import GrammarError
from engine.grammar import json_options
from engine.sampling import GrammarSpec

TAIL: Final = "}\n"


@dataclass(frozen=True, slots=True)
class AnyTool:
    """``tool_choice`` "required": at least one call, of any function."""


@dataclass(frozen=True, slots=True)
class OneTool:
    """``tool_choice`` with a function's name: exactly one call, of that function."""

    name: str


@dataclass(frozen=True, slots=True)
class FreeChoice:
    """``tool_choice`` "auto": text or calls. Only functions that are ``strict`` constrain what the model writes."""


ToolChoice = AnyTool | OneTool | FreeChoice


def tool_grammar(
    tools: Sequence[Mapping[str, object]], choice: ToolChoice, *, is_parallel: bool = True
) -> GrammarSpec | None:
    """``tools`` as on the wire. None when nothing is to be enforced. Raises GrammarError for an unknown name.

    A function that is not ``strict`` is promised valid JSON and as much of its schema as can be enforced; a strict one
    all of it, or GrammarError when it is compiled.
    """
    functions = [_function(tool) for tool in tools]
    if isinstance(choice, OneTool):
        functions = [f for f in functions if f.name == choice.name]
        if not functions:
            raise GrammarError(f"tool_choice names {choice.name[:64]!r}, which is not among the tools")
    if not functions or (isinstance(choice, FreeChoice) and not any(f.is_strict for f in functions)):
        return None
    lines = ["%llguidance {}", *_start_rules(choice, is_parallel), *_call_rules(functions)]
    return GrammarSpec("lark", "\n".join(lines) + "\n")


@dataclass(frozen=True, slots=True)
class _Function:
    name: str
    parameters: Mapping[str, object]
    is_strict: bool


def _function(tool: Mapping[str, object]) -> _Function:
    inner = tool.get("function")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise GrammarError("each tool must be an object with a function that has a name")
    parameters = inner.get("parameters") or {"type": "object"}
    if not isinstance(parameters, Mapping):
        raise GrammarError(f"the parameters of function {inner['name'][:64]!r} must be a JSON schema object")
    return _Function(inner["name"], parameters, inner.get("strict") is True)


def _start_rules(choice: ToolChoice, is_parallel: bool) -> list[str]:
    match choice:
        case FreeChoice():
            return [f"start: TEXT? {'(call TEXT?)*' if is_parallel else 'call?'}", r"TEXT: /(.|\n)+/"]
        case AnyTool() if is_parallel:
            return ['start: call ("\\n" call)*']
        case _:
            return ["start: call"]


def _call_rules(functions: Sequence[_Function]) -> list[str]:
    """``<tool_call>`` without quotes is the token; llguidance takes added tokens in angle brackets for special ones."""
    names = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = ["call: <tool_call> body </tool_call>", f"body: {names}"]
    for i, function in enumerate(functions):
        head = f'\n{{"name": {json.dumps(function.name)}, "arguments": '
        schema = {**_object_schema(function.parameters), "x-guidance": json_options(not function.is_strict)}
        rules.append(f"call_{i}: {json.dumps(head)} args_{i} {json.dumps(TAIL)}")
        rules.append(f"args_{i}: %json {json.dumps(schema)}")
    return rules


def _object_schema(parameters: Mapping[str, object]) -> dict[str, object]:
    """Arguments are an object even where the schema does not say so."""
    has_type = any(key in parameters for key in ("type", "$ref", "anyOf", "oneOf", "allOf"))
    return dict(parameters) if has_type else {"type": "object", **parameters}
