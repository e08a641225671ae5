"""create_app: the routes and what is around them, joined to one ServerState. The only file with FastAPI's switches.

Place in a request's way: step 1; it decides nothing about content.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from server.errors import WireError, error_response, to_wire
from server.middleware import BodyLimit, Boundary, Doorman, HeadAsGet, Recorder
from server.routes import (
    adapters,
    aliases,
    chat,
    completions,
    docs,
    health,
    models,
    sglang,
    tokenize,
    traffic,
    uploads,
    vllm,
)
from server.state import ServerState
from server.version import VERSION

ROUTERS = (
    health.router,
    chat.router,
    completions.router,
    tokenize.router,
    models.router,
    adapters.router,
    aliases.router,
    traffic.router,
    uploads.router,
    vllm.router,
    sglang.router,
    docs.router,
)


def create_app(state: ServerState) -> FastAPI:
    """The ASGI application. The caller owns the state and closes what is in it."""
    app = FastAPI(
        title="Lorikeet",
        version=VERSION,
        description="Many adapters on one resident 4-bit Qwen2.5-VL.",
        docs_url=None,  # ours loads nothing from other hosts
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Recorder, state=state),
            Middleware(Boundary),
            Middleware(Doorman, state=state),
            Middleware(
                BodyLimit,
                max_bytes=int(state.settings.max_body),
                max_raw_bytes=int(state.settings.max_adapter_size),
            ),
            Middleware(HeadAsGet),
        ],
        exception_handlers={
            HTTPException: _answer_http,
            RequestValidationError: _answer,
            WireError: _answer,
        },
    )
    app.state.lorikeet = state
    for router in ROUTERS:
        app.include_router(router)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(to_wire(error))


async def _answer_http(request: Request, error: Exception) -> Response:
    """What routing itself refuses: no such path, no such method there."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 404:
        return error_response(WireError(404, "not_found", "this server has no such path: see /docs"))
    if status == 405:
        allowed = ", ".join(sorted(_methods_at(request)))
        message = f"this path takes {allowed}"
        return error_response(WireError(405, "method_not_allowed", message, headers={"allow": allowed}))
    return error_response(to_wire(error))


def _methods_at(request: Request) -> set[str]:
    """Every method that some route takes at the request's path."""
    path = request.scope["path"]
    routes = (context.original_route for context in iter_route_contexts(request.app.routes))
    matching = [r for r in routes if isinstance(r, APIRoute) and r.path_regex.match(path)]
    methods = {method for route in matching for method in route.methods or ()}
    return methods | ({"HEAD"} if "GET" in methods else set())
