"""Auth: what each route asks of its caller, and whether the caller has it. Decided from the head of a request alone.

Owns: the table of scopes. Does not read bodies, nor decide which adapters a caller may use in a request: routes ask
``Caller.may_use``. Place in a request's way: step 1.
"""

from __future__ import annotations

from typing import Literal

from starlette.requests import HTTPConnection

from server.errors import WireError
from server.keys import Caller, KeyRing, Scope
from server.uploads import UPLOADS_PATH

Need = Scope | Literal["public", "any"]
"""``public``: nobody is asked. ``any``: any valid key."""

PUBLIC_PATHS = frozenset({"/health", "/ready"})
METRICS_PATHS = frozenset({"/metrics"})
ADMIN_PATHS = frozenset(
    {
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/load_lora_adapter",
        "/unload_lora_adapter",
        "/lora-adapters",
    }
)
INFER_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
ADMIN_PREFIXES = ("/v1/adapters", "/v1/models", "/v1/aliases", "/v1/traffic")
"""Reading them takes any key, changing anything below them takes admin."""
_READS = frozenset({"GET", "HEAD", "OPTIONS"})


def need_of(method: str, path: str) -> Need:
    """What a request needs, also where no route exists, so that a stranger cannot map the server."""
    if path in PUBLIC_PATHS:
        return "public"
    if path in METRICS_PATHS:
        return "metrics"
    if path in INFER_PATHS:
        return "infer"
    if path.startswith(UPLOADS_PATH):
        return "admin"
    if method not in _READS and (path in ADMIN_PATHS or path.startswith(ADMIN_PREFIXES)):
        return "admin"
    return "any"


class Gate:
    """Who gets in. Without keys everybody may infer; admin is then for a server that only its own machine can reach."""

    def __init__(self, ring: KeyRing, *, is_loopback: bool) -> None:
        self._ring = ring
        scopes: set[Scope] = {"infer", "metrics"}
        if is_loopback:
            scopes.add("admin")
        self._anyone = Caller("anonymous", frozenset(scopes))

    def admit(self, method: str, path: str, authorization: str | None) -> Caller:
        """The caller. Raises WireError 401 invalid_api_key or 403 insufficient_scope."""
        need = need_of(method, path)
        caller = self._anyone if self._ring.is_empty else self._identify(need, authorization)
        if need not in ("public", "any") and need not in caller.scopes:
            raise WireError(403, "insufficient_scope", self._refusal(need))
        return caller

    def _identify(self, need: Need, authorization: str | None) -> Caller:
        scheme, _, secret = (authorization or "").partition(" ")
        caller = self._ring.find(secret.strip()) if scheme.lower() == "bearer" and secret.strip() else None
        if caller is not None:
            return caller
        if need == "public":
            return Caller("anonymous", frozenset())
        what = "no API key was given" if authorization is None else "the API key is not valid"
        raise WireError(
            401,
            "invalid_api_key",
            f"{what}: send the header Authorization: Bearer KEY",
            headers={"www-authenticate": "Bearer"},
        )

    def _refusal(self, need: Need) -> str:
        if self._ring.is_empty:
            return "this server has no keys and other machines can reach it, so its admin routes are off: set api_key"
        return f"this API key lacks the scope {need}"


def caller_of(connection: HTTPConnection) -> Caller:
    """The caller that the middleware put on the request."""
    caller: Caller = connection.state.caller
    return caller
