"""Tools and the choice among them, as OpenAI writes them. Place in a request's way: step 1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from server.schemas.base import Wire, kind_of

MAX_TOOLS = 128
FOREIGN_TOOL_TYPES = ("custom", "allowed_tools", "web_search", "file_search", "code_interpreter", "mcp")
"""Types of OpenAI's other tools, known and not supported."""

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(Wire):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Wire):
    name: FunctionName


class NamedChoice(Wire):
    type: Literal["function"]
    function: ChosenFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")] | Annotated[NamedChoice, Tag("<object>")],
    Discriminator(kind_of),
]
