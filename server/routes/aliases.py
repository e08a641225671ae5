"""``/v1/aliases``: further names, each for one version of one adapter. Reading takes any key, changing admin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from server import promotions
from server.routes.reply import Fields, actor_of, json_reply
from server.state import state_of
from server.strictjson import read_object

if TYPE_CHECKING:
    from adapters.catalogue import AliasRecord

router = APIRouter(tags=["adapters"])


@router.get("/v1/aliases")
async def list_aliases(request: Request) -> Response:
    """Every alias of an adapter that the caller may use."""
    state, actor = state_of(request), actor_of(request)
    records = [a for a in state.registry.pointers.aliases() if actor.caller.may_use(a.name)]
    return json_reply({"object": "list", "data": [_record(record) for record in records]})


@router.get("/v1/aliases/{alias:path}")
async def show_alias(request: Request, alias: str) -> Response:
    return json_reply(_record(promotions.find_alias(state_of(request), actor_of(request), alias)))


@router.put("/v1/aliases/{alias:path}")
async def point_alias(request: Request, alias: str) -> Response:
    """Make an alias, 201, or move it, 200: to the version that ``target`` means now."""
    state, actor = state_of(request), actor_of(request)
    fields = Fields(await read_object(request))
    target, should_load = fields.text("target", 256), fields.flag("load", True)
    fields.end()
    _, is_new = await promotions.point(state, actor, alias, target, should_load=should_load)
    return json_reply(_record(promotions.find_alias(state, actor, alias)), 201 if is_new else 200)


@router.delete("/v1/aliases/{alias:path}")
async def delete_alias(request: Request, alias: str) -> Response:
    """Forget an alias; what it means stays."""
    record = await promotions.remove_alias(state_of(request), actor_of(request), alias)
    return json_reply({"alias": record.alias, "deleted": True})


def _record(record: AliasRecord) -> dict[str, object]:
    return {
        "alias": record.alias,
        "object": "alias",
        "target": f"{record.name}@{record.version}",
        "name": record.name,
        "version": record.version,
        "before": [f"{name}@{version}" for name, version in record.history],
    }
