"""Tool calls on the wire: what a request asks to be enforced, and calls found in generated text -> OpenAI's objects.

The form in which a model writes calls is the engine's business. Place in a request's way: steps 3 and 11.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from engine.sampling import GrammarSpec
from engine.tool_grammar import AnyTool, FreeChoice, OneTool, tool_grammar
from engine.toolcalls import ParsedCall, ToolCallParser, ToolEvent
from server.errors import unsupported
from server.schemas import ChatRequest
from server.schemas.tools import NamedChoice


def may_call(request: ChatRequest) -> bool:
    """Whether the answer may hold tool calls; otherwise text that looks like one stays text."""
    return bool(request.tools) and request.tool_choice != "none"


def tool_grammar_of(request: ChatRequest) -> GrammarSpec | None:
    """Raises WireError 400 unsupported, or GrammarError."""
    if not may_call(request):
        return None
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported(
            "this server does not combine `tools` with `response_format`: leave one out, or send tool_choice 'none'",
            "response_format",
        )
    choice = request.tool_choice
    wanted = (
        OneTool(choice.function.name)
        if isinstance(choice, NamedChoice)
        else AnyTool()
        if choice == "required"
        else FreeChoice()
    )
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    return tool_grammar(tools, wanted, is_parallel=request.parallel_tool_calls)


@dataclass(frozen=True, slots=True)
class Call:
    """A call with the id that its result will name."""

    index: int
    id: str
    name: str
    arguments: str

    def as_object(self) -> dict[str, object]:
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class CallReader:
    """One choice's text to text and calls. ``is_parallel`` false lets only the first call through."""

    def __init__(self, is_parallel: bool) -> None:
        self._parser = ToolCallParser()
        self._is_parallel = is_parallel
        self.num_calls = 0

    def feed(self, text: str) -> list[str | Call]:
        return self._read(self._parser.feed(text))

    def finish(self) -> list[str | Call]:
        return self._read(self._parser.finish())

    def _read(self, events: list[ToolEvent]) -> list[str | Call]:
        items: list[str | Call] = []
        for event in events:
            if not isinstance(event, ParsedCall):
                items.append(event.text)
            elif self._is_parallel or self.num_calls == 0:
                self.num_calls += 1
                items.append(Call(event.index, f"call_{secrets.token_hex(12)}", event.name, event.arguments))
        return items
