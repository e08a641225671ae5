"""The interactive documentation. Nothing is loaded from other hosts, so it works with the network cut."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from server.errors import WireError
from server.routes.reply import json_reply

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).resolve().parent.parent / "static"
_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "start.js": "text/javascript",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
    )
)


@router.get("/")
async def index(request: Request) -> Response:
    return RedirectResponse("/docs", status_code=307)


@router.get("/docs")
async def page(request: Request) -> Response:
    text = (_FOLDER / "docs.html").read_text("utf-8")
    return HTMLResponse(text, headers={"content-security-policy": _POLICY})


@router.get("/openapi.json")
async def document(request: Request) -> Response:
    return json_reply(request.app.openapi())


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    if name not in _FILES:
        raise WireError(404, "not_found", "this server has no such file")
    folder = _FOLDER if name == "start.js" else _FOLDER / "swagger-ui"
    return FileResponse(folder / name, media_type=_FILES[name], headers={"cache-control": "max-age=86400"})
