"""Profiles: what an adapter is asked with where a request says nothing. The request's own fields always win.

Owns which fields a profile has, and that each is held to the rules of the request's own field: a profile is checked by
the very parser of requests. Knows the registry's layers as values. Place in a request's way: between steps 2 and 3.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from adapters.errors import AdapterRejected, RejectReason
from adapters.package import PROFILE_NAME
from server.errors import WireError, invalid_request, shorten
from server.schemas import ChatRequest, GenerationFields, parse_chat
from server.tools import may_call

if TYPE_CHECKING:
    from adapters.ref import AdapterRef
    from server.state import ServerState

logger = logging.getLogger("lorikeet.server")

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
FIELDS = ("system_prompt", *SAMPLING, "stop", "max_tokens", "response_format", "min_pixels", "max_pixels")
MAX_PIXELS = 1 << 28
"""No picture has more; the server's own ``original_max_pixels`` bounds what is kept."""

AnyRequest = TypeVar("AnyRequest", bound=GenerationFields)


@dataclass(frozen=True, slots=True)
class Profile:
    """Checked. What a request is completed with before it is translated."""

    text: str = "{}"
    """Canonical JSON: equal texts are equal profiles."""
    defaults: ChatRequest | None = None
    """The request fields, parsed; None where there are none."""
    names: tuple[str, ...] = ()
    """Those of ``defaults`` that the profile sets."""
    system_prompt: str | None = None
    max_tokens: int | None = None
    """Kept apart: it gives way where the context leaves less, as a request's own would not."""
    min_pixels: int | None = None
    max_pixels: int | None = None

    def complete(self, request: AnyRequest) -> AnyRequest:
        """``request`` with what it left out. A field that it gave stays, whatever its value."""
        wanted = [name for name in self.names if name not in request.model_fields_set]
        if isinstance(request, ChatRequest) and may_call(request):
            wanted = [name for name in wanted if name != "response_format"]  # the two exclude each other
        if not wanted:
            return request
        return request.model_copy(update={name: getattr(self.defaults, name) for name in wanted})

    def system_for(self, request: ChatRequest) -> str | None:
        """The system prompt, unless the request brings its own."""
        has_own = any(message.role in ("system", "developer") for message in request.messages)
        return None if has_own else self.system_prompt

    def answer_tokens(self, wanted: int | None, least: int, room: int) -> int | None:
        """How long the answer may get where the request does not say (``wanted`` is None)."""
        if wanted is not None or self.max_tokens is None:
            return wanted
        return max(1, min(max(self.max_tokens, least), room))


NO_PROFILE = Profile()


def profile_of(ref: AdapterRef, state: ServerState) -> Profile:
    """What one adapter is served with; the base, and several adapters composed, have none.

    Raises AdapterNotFound; WireError 500 for what was checked when it was set, and is not valid any more.
    """
    if len(ref.versions) != 1:
        return NO_PROFILE
    values = state.registry.conduct.profile(ref.versions[0]).values
    if not values:
        return NO_PROFILE
    try:
        return _profile(_canonical(values))
    except WireError as error:
        logger.error("profile.invalid ref=%s error=%s", ref, error)
        raise WireError(
            500, "internal", f"the profile of {ref} is not valid on this server: {error}; PATCH it"
        ) from error


def check_fields(values: Mapping[str, object]) -> Profile:
    """Raises WireError 400, naming the field as ``profile.<field>``."""
    require_known(values)
    try:
        return _profile(_canonical(values))
    except WireError as error:
        raise invalid_request(str(error), f"profile.{error.param}") from None


def require_known(values: Mapping[str, object]) -> None:
    """Raises WireError 400 for a field that no profile has."""
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        short = shorten(unknown[0], 64)
        raise invalid_request(
            f"unknown field `profile.{short}`; known are {', '.join(FIELDS)}", f"profile.{short}"
        )


def package_defaults(profile: Mapping[str, object]) -> str:
    """What a package's ``profile`` says of serving, as JSON; its other keys are for people.

    Raises AdapterRejected (bad_config).
    """
    values = {name: profile[name] for name in FIELDS if profile.get(name) is not None}
    try:
        check_fields(values)
    except WireError as error:
        raise AdapterRejected(RejectReason.BAD_CONFIG, f"{PROFILE_NAME}: {error}") from None
    return _canonical(values)


def effective(values: Mapping[str, object], origins: Mapping[str, str]) -> dict[str, object]:
    """Every field with its value and where that comes from; ``default`` is the request table's own."""
    table = GenerationFields.model_fields
    return {
        name: {
            "value": values[name] if name in values else table[name].default if name in SAMPLING else None,
            "from": origins.get(name, "default"),
        }
        for name in FIELDS
    }


@lru_cache(maxsize=1024)
def _profile(text: str) -> Profile:
    values: dict[str, object] = json.loads(text)
    system = values.pop("system_prompt", None)
    if system is not None and (not isinstance(system, str) or not system):
        raise invalid_request("`system_prompt`: a text that is not empty", "system_prompt")
    pixels = {
        name: _pixels(name, values.pop(name)) for name in ("min_pixels", "max_pixels") if name in values
    }
    if pixels.get("min_pixels", 0) > pixels.get("max_pixels", MAX_PIXELS):
        raise invalid_request("`min_pixels` is over `max_pixels`", "min_pixels")
    defaults = parse_chat({"messages": [{"role": "user", "content": ""}], **values})
    return Profile(
        text=text,
        defaults=defaults,
        names=tuple(name for name in values if name != "max_tokens"),
        system_prompt=system,
        max_tokens=defaults.max_tokens,
        **pixels,
    )


def _pixels(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_PIXELS:
        raise invalid_request(f"`{name}`: a whole number from 1 to {MAX_PIXELS}", name)
    return value


def _canonical(values: Mapping[str, object]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)
