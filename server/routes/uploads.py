"""``/v1/adapter-uploads``: how a package gets to the server from another machine. All of it takes the scope admin."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adapters.package import COPIED_NAMES
from server.adapter_view import time_text
from server.errors import WireError, shorten
from server.exchange import CLIENT_LEFT
from server.receiving import Expected, receive
from server.routes.reply import Fields, actor_of, json_reply
from server.state import ServerState, state_of
from server.strictjson import read_object
from server.uploads import SCHEME, UPLOADS_PATH, Upload, require_file_name

router = APIRouter(tags=["adapters"])

RAW_TYPE = "application/octet-stream"
_FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {RAW_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(UPLOADS_PATH)
async def open_upload(request: Request) -> Response:
    """An empty upload: PUT the package's files into it, then register it by its ``source``."""
    state, actor = state_of(request), actor_of(request)
    if await request.body():
        Fields(await read_object(request)).end()
    upload = state.uploads.open(actor.caller.name)
    actor.note("upload_opened", _short(upload))
    return json_reply(_record(state, upload), 201)


@router.get(UPLOADS_PATH + "/{upload}")
async def show_upload(request: Request, upload: str) -> Response:
    """What has come of it."""
    state = state_of(request)
    return json_reply(_record(state, state.uploads.find(upload, actor_of(request).caller.name)))


@router.put(UPLOADS_PATH + "/{upload}/{file}", openapi_extra=_FILE_BODY)
async def put_file(request: Request, upload: str, file: str, sha256: str | None = None) -> Response:
    """One file of the package, as it is: 201, or 200 in the place of one that came before."""
    state, actor = state_of(request), actor_of(request)
    _require_raw(request.headers.get("content-type"))
    found = state.uploads.find(upload, actor.caller.name)
    name = require_file_name(file)
    expected = Expected.of(request.headers.get("content-length"), sha256)
    try:
        received = await receive(state.uploads, found, name, request.stream(), expected)
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)
    actor.note("uploaded", _short(found), file=name, bytes=received.num_bytes)
    reply = {"file": name, "bytes": received.num_bytes, "sha256": received.sha256}
    return json_reply(reply, 201 if received.is_new else 200)


@router.delete(UPLOADS_PATH + "/{upload}")
async def delete_upload(request: Request, upload: str) -> Response:
    """Give it up; what has come is deleted."""
    state, actor = state_of(request), actor_of(request)
    found = state.uploads.find(upload, actor.caller.name)
    if found.num_users:
        raise WireError(
            409,
            "adapter_busy",
            "a file of this upload is being written, or it is being registered: wait for that",
            headers={"x-should-retry": "false"},
        )
    await state.uploads.end(found)
    actor.note("upload_deleted", _short(found))
    return json_reply({"id": found.id, "deleted": True})


def _require_raw(content_type: str | None) -> None:
    """Never a type that a web page of another site could send without asking first."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != RAW_TYPE:
        got = f"got {shorten(kind, 64)}" if kind else "there was no content-type header"
        raise WireError(415, "unsupported_media_type", f"send the file's bytes as {RAW_TYPE}; {got}")


def _record(state: ServerState, upload: Upload) -> dict[str, object]:
    expires = datetime.now(UTC) + timedelta(seconds=state.uploads.idle_s)  # asking for it began the time anew
    return {
        "id": upload.id,
        "object": "adapter_upload",
        "source": SCHEME + upload.id,
        "created": time_text(upload.created_s),
        "expires": time_text(expires.timestamp()),
        "files": dict(upload.files),
        "allowed_files": list(COPIED_NAMES),
        "bytes": upload.num_bytes,
        "max_bytes": state.uploads.max_bytes,
    }


def _short(upload: Upload) -> str:
    """Enough to follow it in the log; the whole id would let a reader of logs write into it."""
    return upload.id[:11]
