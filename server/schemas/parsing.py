"""A JSON object to a typed request, or one short error that names the field at fault.

Owns the mapping of pydantic's errors. Place in a request's way: step 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from server.errors import WireError, invalid_request, shorten, unsupported
from server.schemas.base import GenerationFields, Wire
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.defaults import CHAT, COMPLETION, Neutral, take_out_neutral
from server.schemas.messages import FOREIGN_PART_TYPES, PART_TYPES
from server.schemas.tools import FOREIGN_TOOL_TYPES

NULL_IS_A_VALUE = ("adapter",)
"""Fields where null says something; everywhere else at the top it says that the client left the field out."""

AnyWire = TypeVar("AnyWire", bound=Wire)
AnyGeneration = TypeVar("AnyGeneration", bound=GenerationFields)


def parse_chat(body: Mapping[str, object]) -> ChatRequest:
    return _parse(ChatRequest, body, CHAT)


def parse_completion(body: Mapping[str, object]) -> CompletionRequest:
    return _parse(CompletionRequest, body, COMPLETION)


def validate(model: type[AnyWire], body: Mapping[str, object]) -> AnyWire:
    """``body`` as ``model``. Raises WireError 400 invalid_request or unsupported."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise _explain(details[0], len(details) - 1) from None


def _parse(
    model: type[AnyGeneration], body: Mapping[str, object], table: Mapping[str, Neutral]
) -> AnyGeneration:
    rest = take_out_neutral(body, table)
    return validate(model, {k: v for k, v in rest.items() if v is not None or k in NULL_IS_A_VALUE})


def _explain(detail: ErrorDetails, num_more: int) -> WireError:
    path = path_of(detail["loc"])
    more = f" (and {num_more} more)" if num_more else ""
    kind = detail["type"]
    if kind == "extra_forbidden":
        return invalid_request(f"unknown field `{shorten(path, 96)}`{more}", path)
    if kind == "missing":
        return invalid_request(f"`{path}` is required{more}", path)
    if kind == "union_tag_invalid":
        return _explain_tag(detail, path)
    if kind == "union_tag_not_found":
        return invalid_request(f"`{path}` is not of a kind that this field takes: see /docs", path)
    if kind == "literal_error" and path.endswith(".type") and path.startswith("tool"):
        return unsupported(f"`{path}` must be 'function': this server has no other tools", path)
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    return invalid_request(f"`{shorten(path, 96)}`: {message}{more}", path)


def _explain_tag(detail: ErrorDetails, path: str) -> WireError:
    """A role, a part's type, or a value of a kind that the field does not take."""
    context = detail.get("ctx", {})
    tag = str(context.get("tag", "")).strip("<>")
    expected = str(context.get("expected_tags", "")).replace("<", "").replace(">", "")
    if tag in FOREIGN_PART_TYPES:
        wanted = " and ".join(PART_TYPES)
        return unsupported(f"content parts of type {tag!r} are not supported, only {wanted}", f"{path}.type")
    if tag in FOREIGN_TOOL_TYPES:
        return unsupported(f"tools of type {tag!r} are not supported, only functions", f"{path}.type")
    member = ".role" if "'user'" in expected else ".type" if "'text'" in expected else ""
    return invalid_request(f"`{path}{member}`: got {shorten(tag, 32)!r}, expected {expected}", path + member)


def path_of(location: tuple[int | str, ...]) -> str:
    """``messages[0].content[1].text``; the tags of unions, written ``<tag>``, are not part of it."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (step.startswith("<") and step.endswith(">")):
            path += f".{step}" if path else step
    return path
