"""Actors: who does something to adapters, and what exists for them.

Owns the audit line, and the rule that an adapter which a caller's globs do not match does not exist for that caller,
also behind an alias. Knows no HTTP but WireError.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import WireError

if TYPE_CHECKING:
    from adapters.entry import AdapterEntry
    from server.keys import Caller
    from server.state import ServerState

audit_log = logging.getLogger("lorikeet.audit")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, for the audit line and for what exists to them."""

    caller: Caller
    request_id: str

    def note(self, act: str, name: object, **fields: object) -> None:
        more = "".join(f" {key}={value}" for key, value in fields.items())
        audit_log.info(
            "admin.%s name=%s caller=%s request_id=%s%s", act, name, self.caller.name, self.request_id, more
        )


def find(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """The entry of a name or alias that exists for the caller. Raises AdapterNotFound, WireError 404."""
    alias = state.registry.pointers.alias(name)
    require_own(actor, name.partition("@")[0] if alias is None else alias.name, name)
    ref = state.registry.resolve(name, is_visible=actor.caller.may_use)
    if ref.is_base:
        raise WireError(400, "invalid_request", "that is the base, which is always loaded: name an adapter")
    return state.registry.entry(str(ref))


def require_own(actor: Actor, name: str, asked: str) -> None:
    """Raises WireError 404 for ``asked`` unless the caller may use the adapter ``name`` that is behind it."""
    if not actor.caller.may_use(name):
        raise WireError(404, "model_not_found", f"no adapter named {asked[:96]!r}")
