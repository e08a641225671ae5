"""Whether the server lives and takes requests, what it is, and its metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.metrics import CONTENT_TYPE
from server.routes.reply import json_reply
from server.state import state_of, unready_reasons
from server.version import VERSION

router = APIRouter(tags=["health"])


@router.get("/health")
async def health(request: Request) -> Response:
    """Liveness: 200 while the process and its engine run, or the engine is being restarted; 503 asks for a restart of
    the whole. Never touches the device."""
    status = state_of(request).engine.status()
    is_alive = status.is_alive or status.is_restarting
    return json_reply({"status": "ok" if is_alive else "engine_dead"}, 200 if is_alive else 503)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Readiness: loaded, warm and not draining; else 503 with the reasons."""
    reasons = unready_reasons(state_of(request))
    return json_reply({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


@router.get("/version")
async def version(request: Request) -> Response:
    base = state_of(request).base
    return json_reply(
        {
            "version": VERSION,
            "base": {
                "id": base.name,
                "revision": base.revision,
                "fingerprint": base.fingerprint,
                "quantization": base.quantization,
                "dtype": base.dtype,
            },
        }
    )


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text. Written on a thread, so that a scrape delays no stream."""
    text = await asyncio.to_thread(state_of(request).metrics.render)
    return Response(text, media_type=CONTENT_TYPE)
