"""What clients may send to the generating routes: strict models, and the fields that we know and do not support."""

from server.schemas.base import GenerationFields, ResponseFormat, Wire
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.parsing import parse_chat, parse_completion, validate

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "GenerationFields",
    "ResponseFormat",
    "Wire",
    "parse_chat",
    "parse_completion",
    "validate",
]
