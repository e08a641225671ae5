"""``/v1/traffic``: how aliases are split between versions, and what is compared. Reading any key, changing admin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from adapters.traffic import MAX_SIDES, MAX_WEIGHT, Shadow, Traffic
from server import promotions, traffic_acts
from server.errors import invalid_request
from server.routes.reply import Fields, actor_of, json_reply
from server.state import state_of
from server.strictjson import read_object

if TYPE_CHECKING:
    from adapters.catalogue import AliasRecord

router = APIRouter(tags=["adapters"])
_STICKY = re.compile(r"user|header:[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}|metadata:.{1,64}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@router.get("/v1/traffic")
async def list_traffic(request: Request) -> Response:
    """Every alias that is split, of those whose adapters the caller may use."""
    state, actor = state_of(request), actor_of(request)
    found = [a for a in state.registry.pointers.aliases() if a.traffic and actor.caller.may_use(a.name)]
    return json_reply({"object": "list", "data": [_record(record) for record in found]})


@router.get("/v1/traffic/{alias:path}")
async def show_traffic(request: Request, alias: str) -> Response:
    """Of any alias; one that is not split sends all to its version."""
    return json_reply(_record(promotions.find_alias(state_of(request), actor_of(request), alias)))


@router.put("/v1/traffic/{alias:path}")
async def split_traffic(request: Request, alias: str) -> Response:
    """Split an alias by weight between versions of its adapter, and name a shadow."""
    state, actor = state_of(request), actor_of(request)
    fields = Fields(await read_object(request))
    weights = _weights(fields.optional_object("weights"))
    sticky, salt = fields.optional_text("sticky", 80) or "user", fields.optional_text("salt", 64) or ""
    shadow, should_load = _shadow(fields.optional_object("shadow")), fields.flag("load", True)
    fields.end()
    if not _STICKY.fullmatch(sticky):
        raise invalid_request("`sticky` is user, header:NAME or metadata:KEY", "sticky")
    traffic = Traffic(weights, sticky, salt, shadow)
    return json_reply(
        _record(await traffic_acts.split(state, actor, alias, traffic, should_load=should_load))
    )


@router.delete("/v1/traffic/{alias:path}")
async def end_traffic(request: Request, alias: str) -> Response:
    """All of it goes to the alias's own version again, and nothing is compared."""
    return json_reply(_record(await traffic_acts.end(state_of(request), actor_of(request), alias)))


def _weights(given: Mapping[str, object] | None) -> dict[int, float]:
    weights: dict[int, float] = {}
    for number, weight in (given or {}).items():
        if not _VERSION.fullmatch(number):
            raise invalid_request('`weights` are by version, as {"3": 95, "4": 5}', "weights")
        weights[int(number)] = _number(weight, f"weights.{number}", MAX_WEIGHT)
    if not 1 <= len(weights) <= MAX_SIDES or not any(weights.values()):
        raise invalid_request(f"`weights` name 1 to {MAX_SIDES} versions, one of them above 0", "weights")
    return weights


def _shadow(given: dict[str, object] | None) -> Shadow | None:
    if given is None:
        return None
    share = _number(given.pop("share", 1), "shadow.share", 1)
    version, budget = given.pop("version", None), given.pop("tokens_per_minute", None)
    if given:
        raise invalid_request("`shadow` has version, share and tokens_per_minute", "shadow")
    if not share:
        raise invalid_request("`shadow.share` is above 0; leave `shadow` out for none", "shadow.share")
    number = _count(version, "shadow.version")
    return Shadow(number, share, None if budget is None else _count(budget, "shadow.tokens_per_minute"))


def _number(value: object, param: str, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise invalid_request(f"`{param}`: a number from 0 to {most:g}", param)
    return float(value)


def _count(value: object, param: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 10**9:
        raise invalid_request(f"`{param}`: a whole number from 1", param)
    return value


def _record(record: AliasRecord) -> dict[str, object]:
    traffic = record.traffic or Traffic({record.version: 1.0})
    total = sum(traffic.weights.values()) or 1.0
    shadow = traffic.shadow
    return {
        "alias": record.alias,
        "object": "traffic",
        "name": record.name,
        "target": f"{record.name}@{record.version}",
        "is_split": record.traffic is not None,
        "weights": {str(number): weight for number, weight in traffic.weights.items()},
        "shares": {str(number): weight / total for number, weight in traffic.weights.items()},
        "sticky": traffic.sticky,
        "salt": traffic.salt,
        "shadow": shadow
        and {
            "version": shadow.version,
            "share": shadow.share,
            "tokens_per_minute": shadow.tokens_per_minute,
        },
    }
