"""A chat's messages as OpenAI writes them: roles, and contents of text or of parts.

Roles decide what a content may hold: pictures go with user, system and tool messages (as in vLLM), not with the
assistant's. Place in a request's way: step 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from server.errors import invalid_request
from server.schemas.base import Wire, kind_of

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOL_CALLS = 128
MAX_ID_CHARS = 256

Detail = Literal["auto", "low", "high", "original"]
PART_TYPES = ("text", "image_url")
FOREIGN_PART_TYPES = (
    *("input_audio", "audio_url", "video", "video_url", "file", "input_text", "input_image", "input_file"),
    *("image", "image_pil", "image_embeds", "refusal", "thinking"),
)
"""Types of other APIs and servers, known and not supported."""


class TextContent(Wire):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, object] | None = None
    """Harmless: a hint for OpenAI's cache."""


class ImageUrl(Wire):
    url: Annotated[str, Field(min_length=1)]
    detail: Detail | None = None


class ImageContent(Wire):
    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[str, Field(min_length=1), Tag("<string>")] | Annotated[ImageUrl, Tag("<object>")],
        Discriminator(kind_of),
    ]
    prompt_cache_breakpoint: dict[str, object] | None = None

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url

    @property
    def detail(self) -> Detail:
        return "auto" if isinstance(self.image_url, str) else self.image_url.detail or "auto"


def _part_type(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if isinstance(kind, str) else "<no type>"


def _role(value: object) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"<{role}>" if isinstance(role, str) else "<no role>"


Part = Annotated[
    Annotated[TextContent, Tag("<text>")] | Annotated[ImageContent, Tag("<image_url>")],
    Discriminator(_part_type),
]
Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS), Tag("<array>")],
    Discriminator(kind_of),
]
TextContents = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[TextContent], Field(min_length=1, max_length=MAX_PARTS), Tag("<array>")],
    Discriminator(kind_of),
]


class CalledFunction(Wire):
    name: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    arguments: str


class CallMade(Wire):
    id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Wire):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None
    """Harmless: the chat template has no place for it; so with the other roles."""


class UserMessage(Wire):
    role: Literal["user"]
    content: Content
    name: str | None = None


class ToolMessage(Wire):
    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    name: str | None = None


class AssistantMessage(Wire):
    """Also as clients send back what they were answered, with its empty fields."""

    role: Literal["assistant"]
    content: TextContents | None = None
    name: str | None = None
    tool_calls: Annotated[list[CallMade], Field(max_length=MAX_TOOL_CALLS)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[object], Field(max_length=0)] | None = None
    reasoning: None = None
    reasoning_content: None = None

    @model_validator(mode="after")
    def _check_content(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise invalid_request("an assistant message needs `content` or `tool_calls`", "messages")
        return self


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[SystemMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(_role),
]
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
